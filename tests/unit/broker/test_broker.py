"""The broker at work: a real ledger and catalog, engines with a fixed pace, lost channels."""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.broker import Run
from fabric.errors import (
    InsufficientBalance,
    NoReplica,
    StorageBusy,
)
from fabric.ledger import Ledger
from fabric.messages import (
    Placed,
    RunCompleted,
    RunEvent,
    RunFailed,
    RunState,
    Token,
)
from fabric.sql import utc_now
from fabric.testing.runs import Ask, last, settled, words


async def test_a_request_is_answered_charged_and_recorded(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    run = await broker.submit(caller, ask())
    events = await read(run)
    assert isinstance(events[0], Placed)
    assert words(events) == list(range(8))
    completed = last(events)
    assert isinstance(completed, RunCompleted)
    assert (completed.site, completed.model, completed.attempts) == ("alpha", "fixed@1", 1)
    assert completed.usage.prompt_tokens == 3
    assert completed.usage.output_tokens == 8
    assert completed.charge_usu == 3 + 8 * 10
    record = await settled(hub, run)
    assert (record.state, record.charge_usu) == (RunState.COMPLETED, 83)
    assert record.placement == completed.placement
    assert hub.allocation().available_usu == 1_000_000 - 83
    assert hub.allocation().held_usu == 0
    [view] = broker.replicas()
    assert (view.instance, view.num_in_flight) == ("alpha-1", 0)


@pytest.mark.parametrize("closes", [False, True])
async def test_an_end_that_cannot_be_written_is_written_later_and_once(
    hub: Any,
    caller: Identity,
    ask: Ask,
    read: Any,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
    closes: bool,
) -> None:
    record, tries = hub.catalog.record_runs, []

    def record_at_third_try(records: Any) -> None:
        tries.append(records)
        if len(tries) < 3:
            raise StorageBusy(reason="locked")
        record(records)

    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    monkeypatch.setattr(hub.catalog, "record_runs", record_at_third_try)
    run = await broker.submit(caller, ask())
    await read(run)
    await until(lambda: len(tries) == 2)  # with others and alone
    await hub.offload(lambda: None)  # the broker has heard of it
    if closes:
        await broker.close()
        assert len(tries) == 3
    await until(lambda: len(tries) == 3)
    record_of_run = await settled(hub, run)
    assert record_of_run.charge_usu == 83
    assert (hub.allocation().available_usu, hub.allocation().held_usu) == (1_000_000 - 83, 0)
    hub.ledger.verify()


async def test_a_lost_site_costs_an_unstarted_request_nothing_but_time(
    hub: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    alpha = hub.channel("alpha", first_token_s=30.0)
    broker.attach(alpha)
    runs = [await broker.submit(caller, ask(temperature=1.0)) for _ in range(4)]
    broker.attach(hub.channel("beta"))
    await until(lambda: broker.replicas()[0].num_in_flight == 4)
    began = time.monotonic()
    alpha.lose("its process group was killed")
    for run in runs:
        events = await read(run)
        completed = last(events)
        assert isinstance(completed, RunCompleted)
        assert (completed.site, completed.attempts) == ("beta", 2)
        placed = [event for event in events if isinstance(event, Placed)]
        assert "process group was killed" in (placed[1].because or "")
    assert time.monotonic() - began < 2.0
    await hub.offload(lambda: None)
    assert hub.allocation().available_usu == 1_000_000 - 4 * 83


async def test_a_greedy_stream_goes_on_at_another_site(
    hub: Any, caller: Identity, ask: Ask
) -> None:
    hub.grant()
    broker = await hub.broker()
    alpha = hub.channel("alpha", token_s=0.02)
    broker.attach(alpha)
    run = await broker.submit(caller, ask(max_tokens=20))
    events: list[RunEvent] = []
    async for event in run.events():
        events.append(event)
        if isinstance(event, Token) and event.position == 4:
            broker.attach(hub.channel("beta"))
            alpha.lose("gone")
    assert words(events) == list(range(20))
    completed = last(events)
    assert isinstance(completed, RunCompleted)
    assert completed.site == "beta"
    assert completed.usage.output_tokens == 20
    assert completed.charge_usu == 3 + 200


async def test_an_unseeded_stream_breaks_honestly(hub: Any, caller: Identity, ask: Ask) -> None:
    hub.grant()
    broker = await hub.broker()
    alpha = hub.channel("alpha", token_s=0.02)
    broker.attach(alpha)
    broker.attach(hub.channel("beta"))
    run = await broker.submit(caller, ask(max_tokens=20, temperature=1.0, sites=("alpha",)))
    events: list[RunEvent] = []
    async for event in run.events():
        events.append(event)
        if isinstance(event, Token) and event.position == 4:
            alpha.lose("gone")
    failed = last(events)
    assert isinstance(failed, RunFailed)
    assert failed.failure.code == "stream_broken"
    delivered = len(words(events))
    assert failed.charge_usu == 3 + 10 * delivered
    record = await settled(hub, run)
    assert (record.state, record.error_code) == (RunState.FAILED, "stream_broken")


async def test_a_client_that_leaves_frees_the_row_within_a_second(
    hub: Any, caller: Identity, ask: Ask, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    channel = hub.channel("alpha", token_s=0.01)
    broker.attach(channel)
    run = await broker.submit(caller, ask(max_tokens=1000))
    events = run.events()
    async for event in events:
        if isinstance(event, Token) and event.position == 2:
            break
    await events.aclose()  # type: ignore[attr-defined]
    assert await until(lambda: channel.load.num_running == 0, limit_s=1.0) < 1.0
    await until(lambda: hub.allocation().held_usu == 0)
    record = await settled(hub, run)
    assert record.state is RunState.CANCELLED
    assert 3 <= record.usage.output_tokens < 100
    assert record.charge_usu == 3 + 10 * record.usage.output_tokens


async def test_cancel_returns_when_the_run_has_ended(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=0.05, token_s=0.05))
    run = await broker.submit(caller, ask(max_tokens=1000))
    began = time.monotonic()
    await run.cancel()
    assert time.monotonic() - began < 1.0
    failed = last((await read(run))[-1:])
    assert isinstance(failed, RunFailed)
    assert failed.failure.code == "request_cancelled"
    await run.cancel()


async def test_without_a_balance_nothing_is_sent(hub: Any, caller: Identity, ask: Ask) -> None:
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    with pytest.raises(InsufficientBalance):
        await broker.submit(caller, ask())
    hub.grant(amount_usu=10)
    with pytest.raises(InsufficientBalance) as refused:
        await broker.submit(caller, ask())
    assert refused.value.detail["available_usu"] == 10
    assert broker.replicas()[0].num_in_flight == 0


async def test_fifty_at_once_on_a_balance_for_one_admit_exactly_one(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    request = ask(max_tokens=8)
    most_usu = request.prompt_tokens_bound() + 8 * 10
    hub.grant(amount_usu=most_usu)
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=0.5))
    outcomes = await asyncio.gather(
        *(broker.submit(caller, ask(max_tokens=8)) for _ in range(50)), return_exceptions=True
    )
    admitted = [one for one in outcomes if isinstance(one, Run)]
    refused = [one for one in outcomes if isinstance(one, InsufficientBalance)]
    assert (len(admitted), len(refused)) == (1, 49)
    assert isinstance(last(await read(admitted[0])), RunCompleted)


async def test_a_balance_for_two_serves_two_in_a_row(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant(amount_usu=83 + 94)
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    for _ in range(2):
        # The second is admitted right after the first one's last event.
        run = await broker.submit(caller, ask())
        assert isinstance(last(await read(run)), RunCompleted)


async def test_the_deadline_ends_a_run(hub: Any, caller: Identity, ask: Ask, read: Any) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", token_s=0.05))
    run = await broker.submit(caller, ask(max_tokens=1000, deadline_s=0.5))
    began = time.monotonic()
    failed = last(await read(run))
    assert isinstance(failed, RunFailed)
    assert failed.failure.code == "deadline_exceeded"
    assert failed.failure.detail == {"deadline_s": 0.5, "attempts": 1}
    assert 0.3 < time.monotonic() - began < 1.0
    assert failed.charge_usu > 0


async def test_a_slow_client_delays_nobody_else(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker(backlog_events=4, window_events=8)
    broker.attach(hub.channel("alpha"))
    slow = await broker.submit(caller, ask(max_tokens=500))
    slow_events = slow.events()
    await anext(slow_events)
    began = time.monotonic()
    for _ in range(5):
        run = await broker.submit(caller, ask(max_tokens=50))
        assert words(await read(run)) == list(range(50))
    assert time.monotonic() - began < 2.0
    rest = [event async for event in slow_events]
    assert words(rest) == list(range(500))
    assert isinstance(rest[-1], RunCompleted)


async def test_a_slow_client_is_given_no_more_than_its_backlog(
    hub: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker(backlog_events=4, window_events=8)
    taken = 0
    channel = hub.channel("alpha")
    run_task = channel.run

    async def counted(task: Any) -> Any:
        nonlocal taken
        async for event in run_task(task):
            taken += 1
            yield event

    channel.run = counted
    broker.attach(channel)
    run = await broker.submit(caller, ask(max_tokens=500))
    await until(lambda: taken >= 4)
    assert words(await read(await broker.submit(caller, ask(max_tokens=50)))) == list(range(50))
    assert taken - 52 <= 6
    await run.cancel()


DOOMED_HUB = """
import asyncio, sys
from fabric.auth import Identity
from fabric.broker import Broker, BrokerSettings
from fabric.catalog import Catalog
from fabric.ledger import Ledger
from fabric.messages import Request, Sampling, TextInput
from fabric.sql import Database
from fabric.sql.offload import Offload
from fabric.testing.channel import FakeChannel
from fabric.testing.engine import FixedDelayEngine

async def main():
    database = Database(sys.argv[1]).open()
    broker = Broker(
        ledger=Ledger(database), catalog=Catalog(database), offload=Offload(database),
        settings=BrokerSettings(lease_s=1.0),
    )
    await broker.start()
    engine = FixedDelayEngine(token_s=0.01)
    engine.start()
    broker.attach(FakeChannel(engine))
    caller = Identity(
        key_id="k", project="astro", scopes=frozenset({"query"}), max_concurrent=1
    )
    request = Request(
        model="fixed", input=TextInput(text="x"), sampling=Sampling(max_tokens=1000)
    )
    run = await broker.submit(caller, request)
    async for event in run.events():
        print(event.type, flush=True)

asyncio.run(main())
"""


async def test_holds_of_a_killed_hub_come_back_after_their_lease(hub: Any, until: Any) -> None:
    hub.grant()
    doomed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DOOMED_HUB, hub.database.url, stdout=asyncio.subprocess.PIPE
    )
    assert doomed.stdout is not None
    async with asyncio.timeout(20):
        while await doomed.stdout.readline() != b"token\n":
            assert doomed.returncode is None
    doomed.kill()
    await doomed.wait()
    doomed._transport.close()  # type: ignore[attr-defined]
    assert hub.allocation().held_usu > 0
    await hub.broker(sweep_s=0.05)
    await until(lambda: hub.allocation().held_usu == 0)
    assert hub.allocation().available_usu == 1_000_000


async def test_the_hold_of_a_long_run_is_renewed(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker(lease_s=0.3, sweep_s=0.05)
    broker.attach(hub.channel("alpha", first_token_s=1.0))
    run = await broker.submit(caller, ask())
    assert isinstance(last(await read(run)), RunCompleted)
    record = await settled(hub, run)
    assert record.charge_usu == 83


async def test_a_clock_that_jumps_releases_what_was_abandoned_and_no_live_hold(
    hub: Any, caller: Identity, ask: Ask, until: Any
) -> None:
    ahead = timedelta()
    hub.ledger = Ledger(hub.database, clock=lambda: utc_now() + ahead)
    name = hub.grant()
    hub.ledger.hold("abandoned", allocation=name, amount_usu=1000, lease_s=600)
    broker = await hub.broker(lease_s=60, sweep_s=0.05)
    broker.attach(hub.channel("alpha", token_s=0.02))
    run = await broker.submit(caller, ask(max_tokens=2000))
    await until(lambda: run.has_tokens)
    held_usu = hub.allocation().held_usu
    ahead = timedelta(hours=1)
    await until(lambda: hub.allocation().held_usu == held_usu - 1000)
    ahead = -timedelta(hours=1)
    await run.cancel()
    record = await settled(hub, run)
    assert record.charge_usu > 0
    assert hub.allocation().available_usu == 1_000_000 - record.charge_usu
    assert hub.allocation().held_usu == 0


async def test_a_replica_that_joins_in_time_gets_the_waiting_request(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker(patience_s=5.0)
    run = await broker.submit(caller, ask())
    broker.attach(hub.channel("beta"))
    completed = last(await read(run))
    assert isinstance(completed, RunCompleted)
    assert completed.site == "beta"


async def test_where_no_wait_helps_the_request_is_refused(
    hub: Any, caller: Identity, ask: Ask, until: Any
) -> None:
    hub.grant()
    broker = await hub.broker(patience_s=0.0)
    broker.attach(hub.channel("alpha"))
    with pytest.raises(NoReplica) as refused:
        await broker.submit(caller, ask(sites=("beta",)))
    assert "alpha-1" in str(refused.value)
    assert hub.allocation().held_usu == 0


async def test_a_site_allocation_decides_where_a_request_runs(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant("beta")
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    broker.attach(hub.channel("beta"))
    completed = last(await read(await broker.submit(caller, ask())))
    assert isinstance(completed, RunCompleted)
    assert completed.site == "beta"
    assert "no allocation for alpha" in completed.placement.reason


async def test_a_failover_moves_the_hold_to_the_allocation_that_pays(
    hub: Any, caller: Identity, ask: Ask, read: Any, until: Any
) -> None:
    hub.grant("alpha")
    hub.grant("beta", 100_000)
    broker = await hub.broker()
    alpha = hub.channel("alpha", first_token_s=30.0)
    broker.attach(alpha)
    broker.attach(hub.channel("beta"))
    run = await broker.submit(caller, ask(data_site="alpha", data_bytes=10**9))
    await until(lambda: hub.allocation("allocation:astro:alpha").held_usu > 0)
    alpha.lose("gone")
    completed = last(await read(run))
    assert isinstance(completed, RunCompleted)
    assert completed.site == "beta"
    await hub.offload(lambda: None)
    assert hub.allocation("allocation:astro:alpha").available_usu == 1_000_000
    assert hub.allocation("allocation:astro:beta").available_usu == 100_000 - 83


async def test_explain_shows_the_table_and_holds_nothing(
    hub: Any, caller: Identity, ask: Ask
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    broker.attach(hub.channel("beta"))
    placement = await broker.explain(caller, ask(data_site="beta"))
    assert placement.site == "beta"
    assert {one.site for one in placement.candidates} == {"alpha", "beta"}
    assert set(placement.candidates[0].cost_s) == {"queue", "service", "data", "price", "risk"}
    assert hub.allocation().held_usu == 0
