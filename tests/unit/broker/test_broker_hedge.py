"""Requests that hang, in a whole broker: they are rescued, paid once, and trouble nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.messages import Placed, RunCompleted
from fabric.testing.runs import Ask, last, settled, words

HEDGED = {"hedge_samples": 6, "hedge_min_s": 0.3, "explore": 0.0}


async def make_known(broker: Any, caller: Identity, ask: Ask, read: Any) -> None:
    """Let both sites answer often enough that a silence is noticed."""
    for site in ("alpha", "beta") * 3:
        await read(await broker.submit(caller, ask(sites=(site,))))


@pytest.fixture
async def pair(hub: Any) -> Any:
    """A broker, and the two engines it has."""
    hub.grant()
    broker = await hub.broker(**HEDGED)
    for site in ("alpha", "beta"):
        broker.attach(hub.channel(site, first_token_s=0.02))
    return broker


async def test_a_request_that_hangs_is_answered_by_another_and_paid_once(
    hub: Any, pair: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    await make_known(pair, caller, ask, read)
    for engine in hub.engines:
        engine.first_token_s = 60.0
    await hub.offload(lambda: None)
    before_usu = hub.allocation().available_usu
    run = await pair.submit(caller, ask())
    await until(lambda: any(one.num_in_flight for one in pair.replicas()), 20.0)
    [first] = [one.instance for one in pair.replicas() if one.num_in_flight]
    other = next(
        engine
        for engine, channel in zip(hub.engines, ("alpha-1", "beta-1"), strict=True)
        if channel != first
    )
    other.first_token_s = 0.02
    events = await read(run)
    end = last(events)
    assert isinstance(end, RunCompleted)
    assert (end.attempts, end.instance != first) == (2, True)
    assert words(events) == list(range(8))
    assert [event.attempt for event in events if isinstance(event, Placed)] == [1, 2]
    record = await settled(hub, run)
    assert record.charge_usu == end.charge_usu > 0
    balance = hub.allocation()
    assert (balance.available_usu, balance.held_usu) == (before_usu - end.charge_usu, 0)
    # The loser was cancelled where it ran: its row is free again.
    await until(lambda: not any(engine.load().num_running for engine in hub.engines), 20.0)
    assert not any(one.num_in_flight for one in pair.replicas())


async def test_a_request_that_hangs_touches_no_other_at_the_same_instance(
    hub: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker(hedge_quantile=1.0)
    broker.attach(hub.channel("alpha", first_token_s=60.0))
    stuck = await broker.submit(caller, ask())
    [engine] = hub.engines
    await until(lambda: engine.load().num_running, 20.0)
    engine.first_token_s = 0.0
    ends = [
        last(await read(run))
        for run in await asyncio.gather(*(broker.submit(caller, ask()) for _ in range(20)))
    ]
    assert all(isinstance(end, RunCompleted) and end.attempts == 1 for end in ends)
    await stuck.cancel()
