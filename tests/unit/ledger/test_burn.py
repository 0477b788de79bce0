"""How fast allocations are spent."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.ledger import Ledger, burn

DAY_S = 86_400.0


def charge(ledger: Ledger, run: str, amount_usu: int, allocation: str) -> None:
    ledger.hold(run, allocation=allocation, amount_usu=amount_usu + 5, lease_s=60.0)
    ledger.settle(run, amount_usu, site="alpha", model="smol@1")


@pytest.fixture
def general(ledger: Ledger) -> str:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 1_000_000)
    return name


def test_what_was_charged_counts_by_the_day_and_what_was_held_does_not(
    ledger: Ledger, clock: Any, general: str
) -> None:
    own = ledger.open_allocation("astro", "alpha")
    ledger.open_allocation("other", "*")
    charge(ledger, "run_1", 3_000, general)
    clock.advance(2 * DAY_S)
    charge(ledger, "run_2", 1_000, general)
    ledger.hold("run_3", allocation=general, amount_usu=9_000, lease_s=60.0)
    assert ledger.burn("astro") == {general: pytest.approx(2_000.0), own: 0.0}
    assert ledger.burn("nobody") == {}


def test_an_hour_is_not_taken_for_a_week(ledger: Ledger, clock: Any, general: str) -> None:
    charge(ledger, "run_1", 3_000, general)
    clock.advance(3_600.0)
    assert ledger.burn("astro")[general] == pytest.approx(3_000.0)


def test_what_was_spent_long_ago_is_forgotten(ledger: Ledger, clock: Any, general: str) -> None:
    charge(ledger, "run_1", 3_000, general)
    clock.advance(8 * DAY_S)
    assert ledger.burn("astro")[general] == 0.0


def test_of_very_many_charges_the_newest_tell_the_rate(
    ledger: Ledger, clock: Any, general: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burn, "MAX_CHARGES", 4)
    for number in range(12):
        charge(ledger, f"run_{number}", 100, general)
        clock.advance(3_600.0)
    # Four charges in the last four hours.
    assert ledger.burn("astro")[general] == pytest.approx(2_400.0)
