"""What a launch's account has left, as its launcher asks and tells it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from fabric.config import SiteSpec
from fabric.errors import BalanceUnavailable, HubUnreachable
from fabric.launch.balances import Balance
from fabric.launch.jobs import JobRecord, LaunchPlan, Order, get_launch_plan
from fabric.launch.jobs.history import History
from fabric.launch.jobs.login import LocalLogin
from fabric.launch.jobs.means import AskBalance
from fabric.launch.jobs.standing import ASK_S, Standing
from fabric.testing.patience import PATIENCE_S

RECORDED = Path(__file__).parents[3] / "data/balances"
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Hub:
    """A hub that hears of balances; ``is_away`` until it is not."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Mapping[str, object]]] = []
        self.is_away = False

    def report_balance(self, instance: str, balance: Mapping[str, object]) -> None:
        if self.is_away:
            raise HubUnreachable(url="http://hub", reason="it is away")
        self.told.append((instance, balance))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(tmp_path: Path, *, unit: str = "node hour", **changes: object) -> LaunchPlan:
    balance = {"kind": "sbank", "resource": "polaris"}
    system = {
        "center": "Here",
        "scheduler": "local",
        "queues": {"q": {"units_per_node_hour": 2.0}},
        "charge": {"unit": unit, "balance": balance},
        "sources": ["a test"],
        "checked": "2026-11",
    }
    fields = {"model": "m@1", "machine": "here", "walltime": "01:00:00", "account": "neutrinoGPU"}
    order = Order.model_validate(fields | changes)
    site = SiteSpec.model_validate({"name": "here", "system": system})
    return get_launch_plan(order, site, History(tmp_path / "h.jsonl"))


def job(**changes: object) -> JobRecord:
    fields = {"instance": "inst_1", "replica": 0, "generation": 0, "submitted_at": NOW}
    return JobRecord.model_validate(fields | changes)


def make(hub: Hub, ask: AskBalance, clock: Clock) -> Standing:
    return Standing(hub, ask, monotonic=clock)  # type: ignore[arg-type]


def look(standing: Standing, found: LaunchPlan, *jobs: JobRecord) -> None:
    """Look again and again, until what was asked has been taken."""
    until = time.monotonic() + PATIENCE_S
    standing.look(found, jobs or (job(),), NOW)
    while standing.is_asking:
        assert time.monotonic() < until
        time.sleep(0.01)
        standing.look(found, jobs or (job(),), NOW)


def has(available: str, asked: list[str]) -> AskBalance:
    def ask(site: SiteSpec, account: str) -> Balance:
        asked.append(account)
        return Balance(unit="node-hours", granted=None, used=None, available=Decimal(available))

    return ask


def test_the_centres_own_command_is_asked_and_its_answer_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, text = (
        tmp_path / "sbank-list-allocations",
        (RECORDED / "sbank-polaris.txt").read_text(),
    )
    program.write_text(f"#!{sys.executable} -IS\nprint({text!r})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hub = Hub()
    look(make(hub, LocalLogin(tmp_path).balance, Clock()), plan(tmp_path))
    told = {"account": "neutrinoGPU", "unit": "node hours", "available": -394.1, "needed": 2.0}
    assert hub.told == [("inst_1", told)]


@pytest.mark.parametrize(
    ("changes", "jobs", "needed"),
    [
        ({}, [job(deadline_at=NOW + timedelta(minutes=30))], 1.0),
        ({}, [job(deadline_at=NOW), job(instance="inst_2", generation=1)], 2.0),
        ({"replicas": 2}, [job(), job(instance="inst_2", replica=1)], 4.0),
        ({"keep_until": NOW + timedelta(hours=5)}, [job()], 10.0),
        ({"unit": "SU"}, [job()], None),
    ],
    ids=["runs", "hand-over", "replicas", "kept", "another unit"],
)
def test_what_its_jobs_may_still_take_is_told_with_it(
    tmp_path: Path, changes: dict[str, object], jobs: list[JobRecord], needed: float | None
) -> None:
    hub, asked = Hub(), list[str]()
    found = plan(tmp_path, **changes)  # type: ignore[arg-type]
    look(make(hub, has("7", asked), Clock()), found, *jobs)
    [(_, told)] = hub.told
    assert (told["available"], told["needed"]) == (7.0, needed)


def test_a_centre_is_asked_seldom_and_not_for_a_launch_that_is_over(tmp_path: Path) -> None:
    hub, asked, clock, found = Hub(), list[str](), Clock(), plan(tmp_path)
    standing = make(hub, has("7", asked), clock)
    look(standing, found, job(ended_at=NOW))
    assert asked == []
    look(standing, found)
    clock.now = ASK_S - 1
    look(standing, found)
    assert len(asked) == 1
    clock.now = ASK_S
    hub.is_away = True
    look(standing, found)
    assert (len(asked), len(hub.told)) == (2, 1)


def test_nothing_waits_for_a_centre_that_does_not_answer(tmp_path: Path) -> None:
    hub, answers = Hub(), threading.Event()

    def ask(site: SiteSpec, account: str) -> Balance:
        answers.wait(PATIENCE_S)
        return has("7", [])(site, account)

    standing, found = make(hub, ask, Clock()), plan(tmp_path)
    for _ in range(3):
        standing.look(found, (job(),), NOW)
    assert hub.told == []
    assert not answers.is_set()
    answers.set()
    look(standing, found)
    assert len(hub.told) == 1


@pytest.mark.parametrize(
    "fault", [BalanceUnavailable(command="sbank", reason="it is down", remedy="wait"), ValueError()]
)
def test_a_source_that_fails_says_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    def ask(site: SiteSpec, account: str) -> Balance:
        raise fault

    hub, clock, found = Hub(), Clock(), plan(tmp_path)
    standing = make(hub, ask, clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            look(standing, found)
            clock.now += ASK_S
    assert hub.told == []
    assert len(caplog.records) == 1


def test_an_account_that_nobody_named_is_not_asked_for(tmp_path: Path) -> None:
    hub, asked = Hub(), list[str]()
    look(make(hub, has("7", asked), Clock()), plan(tmp_path, account=None))
    assert (asked, hub.told) == ([], [])
