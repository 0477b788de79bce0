"""What administrators change of a tier, as requests meet it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from fabric.auth import Identity, Tiers, TierTerms
from fabric.broker import PROMISES, Broker, get_factors, get_promises, parameters_of
from fabric.errors import TierNotHeld
from fabric.ledger import TIERS
from fabric.messages import Request, RunCompleted
from fabric.testing.broker_rig import Rig, admit, foresee

Ask = Callable[..., Request]


async def charge_usu(broker: Broker, caller: Identity, request: Request, read: Any) -> int:
    completed = (await read(await broker.submit(caller, request)))[-1]
    assert isinstance(completed, RunCompleted)
    return completed.charge_usu


async def test_a_running_hub_charges_by_a_changed_factor_within_seconds(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    # 3 prompt tokens at 1 micro-SU and 8 output tokens at 10, times 1.5.
    assert await charge_usu(broker, caller, ask(tier="interactive"), read) == 125
    Tiers(hub.database).modify("interactive", {"charge_factor": 2})
    began = time.monotonic()
    while (charged := await charge_usu(broker, caller, ask(tier="interactive"), read)) != 166:
        assert charged == 125
        assert time.monotonic() - began < 20, "the hub does not hear of it"
    assert await charge_usu(broker, caller, ask(), read) == 83


async def test_who_was_admitted_before_pays_what_was_told(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=1.5))
    run = await broker.submit(caller, ask())
    Tiers(hub.database).modify("standard", {"charge_factor": 0.5})
    broker.rules.forget()
    assert await charge_usu(broker, caller, ask(), read) == 42
    assert (await read(run))[-1].charge_usu == 83


async def test_attainment_is_of_what_is_promised_now(hub: Any) -> None:
    broker = await hub.broker()
    Tiers(hub.database).modify("standard", {"first_token_s": 3, "share_in_time": 0.5})
    Tiers(hub.database).modify("standard", {"first_token_s": 4})
    async with asyncio.timeout(20):
        while {(4.0, 0.5)} != {
            (one.limit_s, one.objective)
            for one in broker.tiers.attained()
            if (one.tier, one.measure) == ("standard", "first_token")
        }:
            await broker.tiers.heed()
            await asyncio.sleep(0.05)


def test_admission_keeps_the_promise_as_it_was_changed() -> None:
    rig = Rig("alpha")
    for number in range(3):
        sent = admit(rig, run_id=f"run_{number}")
        rig.now += 1.0
        for position in range(4):
            rig.token(sent, position, "stop" if position == 3 else None)
        rig.finish(sent, 4)
    foresee(rig, tier="interactive")
    changed = {"interactive": TierTerms(tier="interactive", first_token_s=0.5)}
    rig.state.line.promises = get_promises(changed)
    with pytest.raises(TierNotHeld) as refused:
        foresee(rig, tier="interactive")
    assert refused.value.detail["limit_s"] == 0.5


def test_a_tier_gets_nothing_that_it_does_not_have() -> None:
    every = TierTerms(
        tier="",
        charge_factor=Decimal(3),
        weight=7.0,
        first_token_s=1.0,
        token_s=0.5,
        share_in_time=0.5,
        share_answered=0.6,
    )
    changed = dict.fromkeys(PROMISES, every)
    promises = get_promises(changed)
    assert promises["batch"].weight == 0.0
    assert promises["batch"].first_token_s is None
    assert promises["introspection"].token_s is None
    assert promises["standard"].admit_s is None
    assert (promises["interactive"].admit_s, promises["interactive"].weight) == (1.0, 7.0)
    assert set(get_factors(changed)) == set(TIERS)
    assert "charge_factor" not in parameters_of("introspection")


def test_what_nobody_changed_is_the_releases() -> None:
    assert get_promises({}) == PROMISES
    assert get_factors({"batch": TierTerms(tier="batch", share_answered=0.9)}) == TIERS
