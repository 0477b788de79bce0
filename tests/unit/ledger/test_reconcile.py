import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from fabric.errors import RequestInvalid
from fabric.ledger import Billed, EndedJob, Ledger, Unit, reconcile
from fabric.ledger.qstat import read_qstat
from fabric.ledger.sacct import read_sacct
from fabric.ledger.tables import accounts
from fabric.sql import Database

START = datetime(2026, 1, 1, tzinfo=UTC)
PBS = Path(__file__).parents[2] / "data/pbs"
RECORDED = Path(__file__).parents[2] / "data/sacct/local-slurm.txt"
GPU_HOUR = Unit(name="gpu-hour", effective_from=START, usu=Decimal(3_600_000))


def job(name: str, charge_usu: int, start_s: float, end_s: float, site: str = "alpha") -> EndedJob:
    return EndedJob(
        site=site,
        job=name,
        charge_usu=charge_usu,
        started_at=START + timedelta(seconds=start_s),
        ended_at=START + timedelta(seconds=end_s),
    )


def billed(amount_usu: int, at_s: float, site: str = "alpha", job: str | None = None) -> Billed:
    at = START + timedelta(seconds=at_s)
    return Billed(site=site, at=at, amount_usu=amount_usu, job=job)


def overheads(found) -> dict[str, int]:
    return {one.job.job: one.amount_usu for one in found.overheads}


def test_overhead_is_the_jobs_charge_less_what_was_billed_in_it() -> None:
    found = reconcile(
        [job("1", 1000, 0, 3600), job("2", 500, 4000, 5000)],
        [billed(300, 10), billed(200, 3599), billed(700, 4500), billed(5, 3900), billed(9, -1)],
    )
    assert overheads(found) == {"1": 500, "2": -200}
    assert found.unattributed_usu == 14


def test_charge_written_just_after_its_job_belongs_to_it() -> None:
    assert overheads(reconcile([job("1", 100, 0, 60)], [billed(40, 100)])) == {"1": 60}


def test_jobs_that_ran_together_share_by_what_they_cost_a_second() -> None:
    found = reconcile([job("1", 3000, 0, 100), job("2", 1000, 0, 100)], [billed(400, 50)])
    assert [one.billed_usu for one in found.overheads] == [300, 100]


def test_known_job_has_its_own_charges_and_other_sites_have_theirs() -> None:
    found = reconcile(
        [job("1", 100, 0, 100), job("2", 100, 0, 100), job("1", 100, 0, 100, site="beta")],
        [billed(60, 50, job="2"), billed(10, 50, site="beta"), billed(7, 50, job="unheard-of")],
    )
    assert [one.amount_usu for one in found.overheads] == [100, 40, 90]
    assert found.unattributed_usu == 7


spans = st.tuples(st.integers(0, 1000), st.integers(0, 500), st.integers(0, 10**9))


@given(
    jobs=st.lists(spans, max_size=8),
    charges=st.lists(st.tuples(st.integers(-200, 2000), st.integers(-100, 10**9)), max_size=20),
)
def test_nothing_that_was_billed_is_lost_or_doubled(
    jobs: list[tuple[int, int, int]], charges: list[tuple[int, int]]
) -> None:
    ended = [job(str(i), usu, start, start + s) for i, (start, s, usu) in enumerate(jobs)]
    found = reconcile([*ended, *ended[:2]], [billed(usu, at_s) for at_s, usu in charges])
    assert len(found.overheads) == len(ended)
    total_usu = sum(one.billed_usu for one in found.overheads) + found.unattributed_usu
    assert total_usu == sum(usu for _, usu in charges)


# In the ledger


def balances(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return dict(connection.execute(select(accounts.c.name, accounts.c.balance_usu)).all())


def test_overheads_are_posted_once(ledger: Ledger, database: Database, clock) -> None:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 10_000)
    clock.advance(50)
    ledger.hold("run_1", allocation=name, amount_usu=400, lease_s=60)
    ledger.settle("run_1", 400, site="alpha")
    ledger.refund("run_1", 100)
    jobs = [job("1", 1000, 0, 100), job("2", 50, 200, 300)]
    found = ledger.reconcile("alpha", jobs)
    assert overheads(found) == {"1": 700, "2": 50}
    again = ledger.reconcile("alpha", [*jobs, job("3", 10, 400, 500)])
    assert overheads(again) == {"3": 10}
    assert balances(database) | {"overhead:alpha": 760, "centre:alpha": -760} == balances(database)
    assert [one.name for one in ledger.allocations()] == [name]


def test_job_told_later_gets_only_its_part_of_what_was_billed(ledger: Ledger, clock) -> None:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 10_000)
    clock.advance(50)
    ledger.hold("run_1", allocation=name, amount_usu=400, lease_s=60)
    ledger.settle("run_1", 400, site="alpha")
    both = [job("1", 1000, 0, 100), job("2", 1000, 0, 100)]
    assert overheads(ledger.reconcile("alpha", both[:1])) == {"1": 600}
    assert overheads(ledger.reconcile("alpha", both)) == {"2": 800}
    assert ledger.reconcile("alpha", []).overheads == ()


# What sacct prints


def test_recorded_output_of_slurm_is_read() -> None:
    jobs = list(read_sacct(RECORDED.read_text(), "alpha", GPU_HOUR))
    assert [(one.job, one.charge_usu) for one in jobs] == [("1", 10_000), ("2", 12_000)]
    (first, _) = jobs
    assert (first.ended_at - first.started_at).total_seconds() == 5
    cpus = read_sacct(RECORDED.read_text(), "alpha", GPU_HOUR, tres="cpu")
    assert [one.charge_usu for one in cpus] == [10_000, 12_000]


@pytest.mark.parametrize(
    "line",
    [
        "1|COMPLETED|1795297935",
        "1|COMPLETED|2026-11-21T21:52:15|2026-11-21T21:52:20|node=1",
        "1|COMPLETED|1795297935|1795297940|cpu=2",
        "1|COMPLETED|1795297935|1795297940|node=many",
        "<html>",
    ],
)
def test_output_of_another_form_is_refused_with_the_command(line: str) -> None:
    with pytest.raises(RequestInvalid, match="sacct -X -P -n"):
        list(read_sacct(line, "alpha", GPU_HOUR))


def test_jobs_that_have_not_ended_are_left_for_later() -> None:
    text = "7|RUNNING|1795297947|Unknown|node=1\n8|CANCELLED by 0|None|1795297947|\n\n"
    assert list(read_sacct(text, "alpha", GPU_HOUR)) == []


# What qstat prints


def qstat(**changes: Any) -> str:
    """The recorded job that ended, changed, beside the one that ran and the one that waited."""
    ended, running, queued = (
        json.loads((PBS / f"{name}.json").read_text()) for name in ("finished", "running", "queued")
    )
    jobs = {"1.pbs": ended | changes, "2.pbs": running, "3.pbs": queued}
    return json.dumps({"timestamp": 1665476030, "pbs_version": "22.05.11", "Jobs": jobs})


def test_recorded_output_of_pbs_is_read() -> None:
    (job,) = read_qstat(qstat(), "alpha", GPU_HOUR)
    assert (job.job, job.charge_usu, job.started_at) == ("1.pbs", 0, job.ended_at)
    assert job.ended_at == datetime(2022, 10, 11, 8, 13, 47, tzinfo=UTC)


def test_a_job_of_pbs_costs_what_it_used_of_what_was_asked_for() -> None:
    asked = {"ncpus": 64, "ngpus": "8", "nodect": 2}
    text = qstat(resources_used={"walltime": "100:00:01"}, Resource_List=asked)
    (job,) = read_qstat(text, "alpha", GPU_HOUR)
    assert job.charge_usu == 2 * 360_001 * 1_000
    assert (job.ended_at - job.started_at).total_seconds() == 360_001
    (gpus,) = read_qstat(text, "alpha", GPU_HOUR, tres="ngpus")
    assert gpus.charge_usu == 4 * job.charge_usu


@pytest.mark.parametrize(
    "text",
    [
        "<html>",
        "[]",
        '{"Jobs": 3}',
        qstat(history_timestamp=None),
        qstat(history_timestamp=10**30),
        qstat(Resource_List={"ncpus": 1}),
        qstat(Resource_List={"nodect": "many"}),
        qstat(resources_used={"walltime": "an hour"}),
        qstat(resources_used={"walltime": "-1:00:00"}),
    ],
)
def test_output_of_another_form_is_refused_with_the_command_of_pbs(text: str) -> None:
    with pytest.raises(RequestInvalid, match="qstat -x -f -F json"):
        list(read_qstat(text, "alpha", GPU_HOUR))


def test_a_job_of_pbs_that_never_started_costs_nothing() -> None:
    text = qstat(resources_used=None)
    assert list(read_qstat(text, "alpha", GPU_HOUR)) == []
    assert list(read_qstat("", "alpha", GPU_HOUR)) == []
