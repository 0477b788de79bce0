"""Runs whose end is written together with something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fabric.auth import Identity
from fabric.messages import Request

Ask = Callable[..., Request]
PROMPT_USU, OUTPUT_USU = 3, 8 * 10


async def test_nothing_is_charged_before_the_end_is_concluded(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker(lease_s=0.3)
    broker.attach(hub.channel("alpha"))
    run = await broker.submit(caller, ask(), deferred=True)
    events = await read(run)
    assert events[-1].charge_usu == PROMPT_USU + OUTPUT_USU
    await hub.offload(lambda: None)
    assert hub.allocation().held_usu > 0
    written: list[str] = []

    def write() -> bool:
        written.append("result")
        return True

    await broker.conclude([run.id], write)
    assert written == ["result"]
    assert hub.catalog.run(run.id).charge_usu == PROMPT_USU + OUTPUT_USU
    assert hub.allocation().held_usu == 0
    await broker.conclude([run.id], write)
    assert written == ["result"]


async def test_without_consent_all_that_was_held_goes_back(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    run = await broker.submit(caller, ask(), deferred=True)
    await read(run)
    await broker.conclude([run.id], lambda: False)
    assert (hub.allocation().held_usu, hub.catalog.run(run.id).charge_usu) == (0, 0)


async def test_what_fails_to_be_written_is_not_charged_until_it_is(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    run = await broker.submit(caller, ask(), deferred=True)
    await read(run)
    held: list[int] = []

    def write() -> bool:
        held.append(hub.allocation().held_usu)
        if len(held) == 1:
            raise OSError("the disk is full")
        return True

    await broker.conclude([run.id], write)
    assert len(held) == 2
    assert min(held) > 0
    assert hub.catalog.run(run.id).charge_usu == PROMPT_USU + OUTPUT_USU


async def test_a_broker_that_closes_returns_what_nobody_concluded(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    run = await broker.submit(caller, ask(), deferred=True)
    await read(run)
    await broker.close()
    assert (hub.allocation().held_usu, hub.catalog.run(run.id).charge_usu) == (0, 0)
