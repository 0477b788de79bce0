"""What schedulers tell of ended jobs, and what machines charge for it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fabric.config import SiteSpec
from fabric.errors import SchedulerFailed
from fabric.launch.jobs import JobRecord, Order
from fabric.launch.jobs.accounting import (
    JobUsage,
    get_usage,
    parse_qstat_usage,
    parse_sacct,
    parse_scontrol_usage,
    to_elapsed_s,
)
from fabric.launch.jobs.charges import PATIENCE_S, JobAccounts
from fabric.messages import InstanceState

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
RECORDED = Path(__file__).parents[3] / "data" / "pbs"


@pytest.mark.parametrize(
    ("output", "usage"),
    [
        ("COMPLETED|1800|2\n", (1800, 2)),
        ("CANCELLED by 1000|75|1\n", (75, 1)),
        ("CANCELLED by 1000|0|0\n", (0, 1)),
        ("PREEMPTED|100|4\nTIMEOUT|50|4\n", (150, 4)),
        ("RUNNING|10|1\n", None),
        ("PENDING|0|1\n", None),
        ("", None),
    ],
)
def test_sacct_tells_time_and_nodes(output: str, usage: tuple[float, int] | None) -> None:
    told = parse_sacct(output)
    assert (told and (told.elapsed_s, told.num_nodes)) == usage


def test_a_cluster_without_accounts_is_asked_by_its_controller() -> None:
    over = "JobId=7 JobState=TIMEOUT Reason=TimeLimit RunTime=1-00:02:03 NumNodes=3"
    told = parse_scontrol_usage(over)
    assert told is not None
    assert (told.elapsed_s, told.num_nodes, told.source) == (86_523, 3, "scontrol")
    assert parse_scontrol_usage(over.replace("TIMEOUT", "COMPLETING")) is None
    waited = "JobId=7 JobState=CANCELLED RunTime=00:00:00 NumNodes=1-4"
    assert parse_scontrol_usage(waited) == JobUsage(elapsed_s=0, num_nodes=1, source="scontrol")


def test_qstat_tells_the_walltime_that_was_used() -> None:
    finished = json.loads((RECORDED / "finished.json").read_text())
    finished["resources_used"]["walltime"] = "01:00:30"
    running = json.loads((RECORDED / "running.json").read_text())
    output = json.dumps({"Jobs": {"12.pbs": finished, "13.pbs": running}})
    told = parse_qstat_usage(output, "12.pbs-server")
    assert told is not None
    assert (told.elapsed_s, told.num_nodes) == (3630, 1)
    assert parse_qstat_usage(output, "13.pbs") is None
    assert parse_qstat_usage(output, "14.pbs") is None
    with pytest.raises(SchedulerFailed, match="not JSON"):
        parse_qstat_usage("Connection refused", "12.pbs")


@pytest.mark.parametrize("text", ["", "INVALID", "1:2", "12:00", "-1:00:00"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert to_elapsed_s(text) is None


def test_a_scheduler_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerFailed, match="sacct"):
        get_usage("slurm", "1")
    assert get_usage("local", str(os.getpid())) is None


def accounts(scheduler: str = "slurm", **queue: object) -> JobAccounts:
    system = {
        "center": "Here",
        "scheduler": scheduler,
        "queues": {"q": queue},
        "charge": {"unit": "SU", "min_hours": 0.25},
        "sources": ["a test"],
        "checked": "2026-11",
    }
    site = SiteSpec.model_validate({"name": "here", "system": system})
    order = Order(model="m@1", machine="here", walltime="01:00:00", nodes=2)
    return JobAccounts(order, site, "q")


def ended(**changes: object) -> JobRecord:
    fields = {
        "instance": "inst_1",
        "replica": 0,
        "generation": 0,
        "job_id": "7",
        "state": InstanceState.STOPPED,
        "submitted_at": NOW - timedelta(hours=1),
        "started_at": NOW - timedelta(minutes=30),
        "ended_at": NOW,
    }
    return JobRecord.model_validate(fields | changes)


USED = JobUsage(elapsed_s=1800, num_nodes=2, source="sacct")


def test_a_job_is_charged_by_the_machines_rule() -> None:
    settled = accounts(units_per_node_hour=3.0, charge_factor=2.0).settle(ended(), USED, NOW)
    assert (settled.charge, settled.unit) == (pytest.approx(3 * 2 * 2 * 0.5), "SU")
    short = JobUsage(elapsed_s=60, num_nodes=2, source="sacct")
    least = accounts(units_per_node_hour=3.0).settle(ended(), short, NOW)
    assert least.charge == pytest.approx(3 * 2 * 0.25)


def test_where_no_rate_is_known_node_hours_are_told() -> None:
    settled = accounts().settle(ended(), USED, NOW)
    assert (settled.charge, settled.unit) == (1.0, "node-hour")


def test_a_job_that_never_had_its_nodes_costs_nothing() -> None:
    none = JobUsage(elapsed_s=0, num_nodes=1, source="sacct")
    settled = accounts(units_per_node_hour=3.0).settle(ended(started_at=None), none, NOW)
    assert settled.charge == 0.0


def test_books_that_lag_are_waited_for_and_then_done_without() -> None:
    own = accounts(units_per_node_hour=1.0)
    job = ended()
    assert own.owes(job)
    early = NOW + timedelta(seconds=PATIENCE_S - 1)
    assert own.settle(job, None, early) == job
    late = own.settle(job, None, NOW + timedelta(seconds=PATIENCE_S))
    assert late.usage == JobUsage(elapsed_s=1800, num_nodes=2, source="launcher")
    assert own.owes(late)
    assert not own.owes(late.model_copy(update={"is_told": True}))


def test_what_has_not_ended_or_has_no_scheduler_owes_nothing() -> None:
    assert not accounts().owes(ended(ended_at=None))
    assert not accounts().owes(ended(job_id=None))
    assert not accounts("local").owes(ended())
