"""Whether an account can pay for a launch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from fabric.config import SiteSpec
from fabric.errors import AllocationTooSmall, BalanceUnavailable, SettingInvalid
from fabric.launch.balances import Balance
from fabric.launch.jobs import LaunchPlan, Order, get_launch_plan
from fabric.launch.jobs.history import History
from fabric.launch.jobs.means import get_means

Ask = Callable[[SiteSpec, str], Balance]


def plan(tmp_path: Path, *, unit: str = "node-hour", **changes: object) -> LaunchPlan:
    system = {
        "center": "Here",
        "scheduler": "local",
        "queues": {"q": {"units_per_node_hour": 2.0}},
        "charge": {"unit": unit},
        "sources": ["a test"],
        "checked": "2026-11",
    }
    fields = {"model": "m@1", "machine": "here", "walltime": "00:30:00", "account": "astro"}
    order = Order.model_validate(fields | changes)
    site = SiteSpec.model_validate({"name": "here", "system": system})
    return get_launch_plan(order, site, History(tmp_path / "h.jsonl"))


def has(available: str, unit: str = "node-hours") -> Ask:
    def ask(site: SiteSpec, account: str) -> Balance:
        assert (site.name, account) == ("here", "astro")
        return Balance(
            unit=unit,
            granted=None,
            used=None,
            available=Decimal(available),
            as_of=datetime.now(UTC),
        )

    return ask


def test_what_remains_is_the_balance_less_the_charge_of_all_jobs(tmp_path: Path) -> None:
    means = get_means(plan(tmp_path, replicas=6), has("10"))
    assert means.charge == pytest.approx(2 * 0.5 * 6)
    assert means.remains == Decimal(4)
    means.check("here")


def test_jobs_that_follow_one_another_are_counted(tmp_path: Path) -> None:
    until = datetime.now(UTC) + timedelta(hours=2)
    means = get_means(plan(tmp_path, keep_until=until), has("10"))
    assert means.charge == pytest.approx(4.0)


def test_a_launch_that_may_take_more_than_there_is_is_refused(tmp_path: Path) -> None:
    means = get_means(plan(tmp_path, replicas=2), has("1.5"))
    assert means.remains == Decimal("-0.5")
    with pytest.raises(AllocationTooSmall) as caught:
        means.check("here")
    assert "has 1.5 node-hours left and the launch may take 2" in caught.value.message
    assert "--force" in caught.value.message
    assert caught.value.detail["account"] == "astro"


def test_an_overdrawn_account_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AllocationTooSmall):
        get_means(plan(tmp_path), has("-3")).check("here")


def test_what_is_counted_in_another_unit_is_shown_and_not_compared(tmp_path: Path) -> None:
    means = get_means(plan(tmp_path), has("0.1", "GPU hours"))
    assert means.balance is not None
    assert means.remains is None
    assert means.unknown == "the centre counts GPU hours and the charge is in node-hours"
    means.check("here")


def test_a_centre_that_does_not_say_refuses_nothing(tmp_path: Path) -> None:
    def ask(site: SiteSpec, account: str) -> Balance:
        raise BalanceUnavailable(command="sbank", reason="it is down", remedy="ask again later")

    means = get_means(plan(tmp_path), ask)
    assert (means.balance, means.failed) == (None, True)
    assert "it is down" in means.unknown
    means.check("here")


def test_a_site_file_that_does_not_say_how_to_ask_is_no_failure(tmp_path: Path) -> None:
    def ask(site: SiteSpec, account: str) -> Balance:
        raise SettingInvalid(setting="balance", value=None, reason="the file does not say")

    means = get_means(plan(tmp_path), ask)
    assert (means.failed, means.unknown) == (False, "not asked: the file does not say")


def test_without_an_account_nobody_is_asked(tmp_path: Path) -> None:
    def ask(site: SiteSpec, account: str) -> Balance:
        raise AssertionError("asked")

    means = get_means(plan(tmp_path, account=None), ask)
    assert means.unknown == "not asked: no account is named (--account)"
    means.check("here")
