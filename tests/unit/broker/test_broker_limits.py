"""What the broker refuses, and what it settles when something fails."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.broker import Broker, Run
from fabric.errors import (
    ContextExceeded,
    Duplicate,
    NoReplica,
    PermissionDenied,
    RateMissing,
    StorageFull,
    TooManyRequests,
    UnknownModel,
    UnknownSite,
)
from fabric.ledger import Ledger, Settlement
from fabric.messages import (
    Placed,
    RunCompleted,
    RunFailed,
    RunState,
    Sampling,
    Token,
    TokensInput,
    Usage,
)
from fabric.testing.runs import Ask, last, settled

REFUSALS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"model": "nope"}, UnknownModel),
    ({"sites": ("alpha", "gamma")}, UnknownSite),
    ({"data_site": "gamma"}, UnknownSite),
    ({"input": TokensInput(ids=(1,) * 3000)}, ContextExceeded),
]


@pytest.mark.parametrize(("changes", "error"), REFUSALS)
async def test_what_cannot_be_is_refused_before_anything_is_held(
    hub: Any, caller: Identity, ask: Ask, changes: dict[str, Any], error: type[Exception]
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    with pytest.raises(error):
        await broker.submit(caller, ask(**changes))
    assert hub.allocation().held_usu == 0


async def test_a_prompt_that_only_the_engine_can_count_is_refused_by_it(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    failed = last(await read(await broker.submit(caller, ask(max_tokens=2047))))
    assert isinstance(failed, RunFailed)
    assert failed.failure.code == "context_length_exceeded"
    assert failed.failure.detail["prompt_tokens"] == 3
    assert failed.usage == Usage()
    await hub.offload(lambda: None)
    assert hub.allocation().available_usu == 1_000_000


async def test_a_key_without_the_permission_is_refused(
    hub: Any, caller: Identity, ask: Ask
) -> None:
    broker = await hub.broker()
    with pytest.raises(PermissionDenied):
        await broker.submit(replace(caller, scopes=frozenset()), ask())


async def test_a_disabled_or_unpriced_site_takes_nothing(
    hub: Any, caller: Identity, ask: Ask
) -> None:
    hub.grant()
    hub.catalog.modify_site("alpha", state="disabled")
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    broker.attach(hub.channel("beta"))
    assert (await broker.explain(caller, ask())).site == "beta"
    with pytest.raises(RateMissing):
        await broker.submit(caller, ask(sites=("alpha",)))


async def test_the_limit_of_a_key_cannot_be_overshot(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=0.1))
    few = replace(caller, max_concurrent=3)
    outcomes = await asyncio.gather(
        *(broker.submit(few, ask()) for _ in range(10)), return_exceptions=True
    )
    admitted = [one for one in outcomes if isinstance(one, Run)]
    assert len(admitted) == 3
    assert sum(isinstance(one, TooManyRequests) for one in outcomes) == 7
    for run in admitted:
        await read(run)
    # A refusal and an end both give the place back.
    await read(await broker.submit(few, ask()))
    with pytest.raises(UnknownModel):
        await broker.submit(few, ask(model="nope"))
    for run in [await broker.submit(few, ask()) for _ in range(3)]:
        await read(run)


async def test_one_id_runs_once(hub: Any, caller: Identity, ask: Ask) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=5.0))
    request = ask()
    first, second = await asyncio.gather(
        broker.submit(caller, request), broker.submit(caller, request), return_exceptions=True
    )
    assert isinstance(first, Run)
    assert isinstance(second, Duplicate)


async def test_a_caller_that_leaves_during_admission_leaves_nothing_held(
    hub: Any, caller: Identity, ask: Ask, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    await broker.explain(caller, ask())
    path = hub.database.url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # The hold waits for it.
        submitting = asyncio.create_task(broker.submit(caller, ask()))
        await asyncio.sleep(0)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        other.execute("ROLLBACK")
    await hub.offload(lambda: None)
    assert hub.allocation().held_usu == 0


class FullDisk(Ledger):
    """A ledger whose disk is full for the first writes."""

    num_failures = 3

    def settle(self, *args: Any, **kwargs: Any) -> Settlement:
        if self.num_failures:
            self.num_failures -= 1
            raise StorageFull(reason="database or disk is full")
        return super().settle(*args, **kwargs)


async def test_a_settlement_that_fails_is_made_later_and_once(
    hub: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    hub.grant()
    hub.ledger = FullDisk(hub.database)
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    runs = [await broker.submit(caller, ask()) for _ in range(3)]
    for run in runs:
        assert isinstance(last(await read(run)), RunCompleted)
    await until(lambda: hub.allocation().held_usu == 0)
    assert hub.ledger.num_failures == 0
    assert hub.allocation().available_usu == 1_000_000 - 3 * 83
    for run in runs:
        assert (await settled(hub, run)).charge_usu == 83


async def test_a_hold_that_was_lost_is_not_charged_and_says_so(
    hub: Any, caller: Identity, ask: Ask, read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=0.1))
    run = await broker.submit(caller, ask())
    await hub.offload(hub.ledger.void, run.id)
    assert isinstance(last(await read(run)), RunCompleted)
    assert (await settled(hub, run)).charge_usu == 0
    assert "run not charged" in caplog.messages
    assert hub.allocation().available_usu == 1_000_000


async def test_closing_the_hub_settles_what_ran(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker: Broker = await hub.broker()
    broker.attach(hub.channel("alpha", token_s=0.01))
    run = await broker.submit(caller, ask(max_tokens=1000))
    events = run.events()
    async for event in events:
        if isinstance(event, Token):
            break
    await broker.close()
    record = hub.catalog.run(run.id)
    assert record.state is RunState.CANCELLED
    assert record.charge_usu >= 13
    assert hub.allocation().held_usu == 0
    with pytest.raises(NoReplica):
        await broker.submit(caller, ask())


async def test_a_stuck_replica_is_left_for_the_next(
    hub: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker(first_token_timeout_s=0.3)
    broker.attach(hub.channel("alpha", first_token_s=60.0))
    run = await broker.submit(caller, ask(max_tokens=1))
    broker.attach(hub.channel("beta"))
    events = await read(run)
    completed = last(events)
    assert isinstance(completed, RunCompleted)
    assert (completed.site, completed.attempts) == ("beta", 2)
    assert isinstance(events[1], Placed)
    assert "sent nothing" in (events[1].because or "")


async def test_an_engine_that_fails_a_row_fails_only_that_run(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", fail_after=3))
    failed = last(await read(await broker.submit(caller, ask())))
    assert isinstance(failed, RunFailed)
    assert failed.failure.code == "row_failed"
    assert failed.charge_usu == 3 + 30


async def test_choices_are_counted_together(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    sampling = Sampling(max_tokens=4, temperature=1.0, n=3)
    completed = last(await read(await broker.submit(caller, ask(sampling=sampling))))
    assert isinstance(completed, RunCompleted)
    assert completed.usage.output_tokens == 12
    assert len(completed.finish_reasons) == 3
    assert completed.charge_usu == 3 + 120


async def test_an_instance_that_redials_replaces_itself(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    old = hub.channel("alpha", instance="alpha-1")
    broker.attach(old)
    broker.attach(hub.channel("alpha", instance="alpha-1"))
    old.lose("half open")
    assert isinstance(last(await read(await broker.submit(caller, ask()))), RunCompleted)
    assert len(broker.replicas()) == 1
