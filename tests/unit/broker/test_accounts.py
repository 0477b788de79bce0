"""What the accounts of users' own instances have left, and what choices make of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.broker.accounts import MAX_ACCOUNTS, MEMORY_S, Account, OwnAccounts
from fabric.broker.facts import MAX_SCARCITY
from fabric.broker.select import select
from fabric.catalog import OwnSite
from fabric.messages import Request
from fabric.testing.choices import context, offer, replica, request

NODE_HOURS = "node-hours"


def account(
    name: str = "m1", *, available: float, needed: float | None = 10.0, asked_at: float = 0.0
) -> Account:
    return Account(
        name=name, unit=NODE_HOURS, available=available, needed=needed, asked_at=asked_at
    )


@pytest.mark.parametrize(
    ("available", "needed", "shortfall"),
    [
        (20.0, 10.0, 0.0),
        (10.0, 10.0, 0.0),
        (5.0, 10.0, 1.0),
        (1e-9, 10.0, MAX_SCARCITY),
        (0.0, 10.0, MAX_SCARCITY),
        (-3.0, 10.0, MAX_SCARCITY),
        (-3.0, None, 0.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_an_account_falls_short_of_what_its_jobs_still_need(
    available: float, needed: float | None, shortfall: float
) -> None:
    assert account(available=available, needed=needed).shortfall == shortfall


def test_the_newest_answer_of_each_account_counts_for_an_hour() -> None:
    accounts = OwnAccounts()
    accounts.tell("mine", account(available=5, asked_at=10))
    accounts.tell("mine", account(available=20, asked_at=5))
    accounts.tell("mine", account("m2", available=2, asked_at=20))
    assert [(one.name, one.available) for one in accounts.of("mine", 30)] == [("m2", 2), ("m1", 5)]
    assert accounts.shortfalls(("mine", "other"), 30) == {"mine": 4.0}
    assert [one.name for one in accounts.of("mine", 15 + MEMORY_S)] == ["m2"]
    assert accounts.of("mine", 21 + MEMORY_S) == []
    assert accounts.shortfalls(("mine",), 21 + MEMORY_S) == {}


def test_a_site_has_no_more_accounts_than_anybody_has() -> None:
    accounts = OwnAccounts()
    for number in range(3 * MAX_ACCOUNTS):
        accounts.tell("mine", account(f"m{number}", available=1))
    names = {one.name for one in accounts.of("mine", 0)}
    assert names == {f"m{number}" for number in range(2 * MAX_ACCOUNTS, 3 * MAX_ACCOUNTS)}


def test_of_two_machines_of_ones_own_the_one_whose_account_lasts_is_taken() -> None:
    free: dict[str, Any] = {"expected_charge_usu": 0, "max_charge_usu": 0}
    means = context(offer("short", **free, lacking_usu=5_000.0), offer("rich", **free))
    pair = [replica("inst_a", "short"), replica("inst_b", "rich", num_busy=1)]
    placement = select(request(), pair, means)
    assert placement.site == "rich"
    assert placement.reason.startswith("rich: the balance is less scarce there")
    [short] = [one for one in placement.candidates if one.site == "short"]
    assert short.cost_s["price"] == pytest.approx(5_000e-6 * means.settings.seconds_per_su)
    assert select(request(policy="fastest"), pair, means).site == "short"


async def test_what_is_told_of_an_account_counts_at_its_site_alone(
    hub: Any, caller: Identity, ask: Callable[..., Request]
) -> None:
    hub.grant()
    for name in ("short", "rich"):
        own = OwnSite(machine=name, project="astro", key_id="key_1", sharing="private")
        hub.catalog.add_site(name, facts={"owner": own.model_dump()})
        hub.ledger.set_rate("*", name, prompt_usu=0, cached_prompt_usu=0, output_usu=0)
        hub.ledger.open_allocation("astro", name)
    broker = await hub.broker(explore=0.0)
    for name in ("alpha", "short", "rich"):
        broker.attach(hub.channel(name))

    async def prices(**changes: Any) -> dict[str, float | None]:
        table = (await broker.explain(caller, ask(**changes))).candidates
        return {one.site: one.cost_s.get("price") for one in table}

    before = await prices(overflow=True)
    assert (before["short"], before["rich"]) == (0.0, 0.0)
    now = time.monotonic()
    broker.arrivals.accounts.tell("short", account(available=1.0, asked_at=now))
    broker.arrivals.accounts.tell("rich", account(available=100.0, asked_at=now))
    after = await prices(overflow=True)
    assert (after["rich"], after["alpha"]) == (0.0, before["alpha"])
    # Nine times as much lacks as there is, and the fabric's usual price is what it is at alpha.
    assert after["short"] == pytest.approx(9 * (after["alpha"] or 0.0))
    kept = await prices()
    assert kept["alpha"] is None
    assert (await broker.explain(caller, ask())).site == "rich"
