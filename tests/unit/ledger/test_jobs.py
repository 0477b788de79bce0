"""Memos of what machines charge for jobs: in statements, and in no balance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from sqlalchemy import text

from fabric.errors import UnknownAccount
from fabric.ledger import JobCharge, Ledger
from fabric.sql import Database

JOB = JobCharge(
    project="astro",
    launch="l-0a1b2c3d",
    job_id="4711",
    site="delta-astro",
    instance="inst_1",
    model="smol@1",
    account="abcd-delta-gpu",
    num_nodes=2,
    elapsed_s=900.0,
    charge=Decimal("1234.500001"),
    unit="SU",
    source="sacct",
    ended_at=datetime(2026, 11, 21, 12, tzinfo=UTC),
)


@pytest.fixture
def own(ledger: Ledger) -> Ledger:
    ledger.open_allocation("astro", "delta-astro")
    ledger.grant(ledger.open_allocation("astro", "*"), 1000)
    return ledger


def test_a_memo_is_a_line_that_moves_nothing(own: Ledger) -> None:
    assert own.note_job(JOB) == JOB
    statement = own.statement("astro")
    grant, memo = statement.lines
    assert (grant.kind, grant.job) == ("grant", None)
    assert (memo.kind, memo.job, memo.site, memo.model) == ("memo", "4711", JOB.site, JOB.model)
    assert (memo.amount_usu, memo.balance_usu) == (0, 0)
    said = "job 4711 of l-0a1b2c3d: 1,235 SUs of abcd-delta-gpu (2 nodes, 900 s)"
    assert memo.memo == said
    assert sum(one.available_usu for one in statement.allocations) == 1000
    own.verify()


def test_the_same_job_again_changes_nothing(own: Ledger) -> None:
    own.note_job(JOB)
    assert own.note_job(replace(JOB, charge=Decimal(7))) == JOB
    assert [line.kind for line in own.statement("astro").lines] == ["grant", "memo"]
    assert own.job_charges() == [JOB]


def test_many_reports_at_once_are_one(own: Ledger) -> None:
    with ThreadPoolExecutor(8) as threads:
        noted = list(threads.map(lambda _: own.note_job(JOB), range(16)))
    assert set(noted) == {JOB}
    assert own.job_charges("astro") == [JOB]


def test_jobs_are_told_apart_by_launch_and_project(own: Ledger) -> None:
    own.open_allocation("bio", "delta-astro")
    others = [replace(JOB, launch="l-ffffffff"), replace(JOB, project="bio")]
    for job in (JOB, *others):
        own.note_job(job)
    assert own.job_charges("astro") == [JOB, others[0]]
    assert own.job_charges("astro", launch="l-ffffffff") == [others[0]]
    assert own.job_charges("bio") == [others[1]]


def test_a_job_of_no_account_here_is_refused(ledger: Ledger) -> None:
    with pytest.raises(UnknownAccount):
        ledger.note_job(JOB)
    assert ledger.job_charges() == []


def test_a_memo_is_never_changed(own: Ledger, database: Database) -> None:
    own.note_job(JOB)
    for change in ("UPDATE journal SET memo = ''", "DELETE FROM journal"):
        with pytest.raises(Exception, match="never changed"), database.transaction() as connection:
            connection.execute(text(change))
