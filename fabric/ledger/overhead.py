"""Overheads of jobs, written once: ``overhead:<site>`` against ``centre:<site>``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, Row, func, insert, select

from fabric.ledger.allocations import own_allocation
from fabric.ledger.posting import account_id, post
from fabric.ledger.reconcile import GRACE, Billed, EndedJob, Reconciliation, reconcile
from fabric.ledger.tables import accounts, entries, journal, reconciled_jobs


def post_overheads(
    connection: Connection, site: str, jobs: Sequence[EndedJob], at: datetime
) -> Reconciliation:
    """Post what jobs of a site cost beyond what was billed in them. See ``Ledger.reconcile``."""
    if not jobs:
        return Reconciliation(overheads=(), unattributed_usu=0)
    first_at = min(job.started_at for job in jobs)
    last_at = max(job.ended_at for job in jobs) + GRACE
    # Jobs that ran beside these and were told before have their part of what was billed.
    before = select(reconciled_jobs).where(
        reconciled_jobs.c.site == site,
        reconciled_jobs.c.ended_at > first_at - GRACE,
        reconciled_jobs.c.started_at < last_at,
    )
    known = {row.job: _to_job(row) for row in connection.execute(before)}
    found = reconcile([*jobs, *known.values()], _billed(connection, site, first_at, last_at))
    asked = {job.job for job in jobs} - known.keys()
    new = tuple(one for one in found.overheads if one.job.job in asked)
    overhead = own_allocation(connection, f"overhead:{site}", site)
    centre = account_id(connection, f"centre:{site}", may_go_negative=True)
    for one in new:
        job = one.job
        post(
            connection,
            {overhead.account_id: one.amount_usu, centre: -one.amount_usu},
            kind="overhead",
            at=at,
            allocation_id=overhead.id,
            key=f"overhead:{site}:{job.job}",
            site=site,
            memo=f"job {job.job}: {job.charge_usu} charged, {one.billed_usu} billed",
        )
        connection.execute(
            insert(reconciled_jobs),
            {
                "site": site,
                "job": job.job,
                "charge_usu": job.charge_usu,
                "billed_usu": one.billed_usu,
                "started_at": job.started_at,
                "ended_at": job.ended_at,
            },
        )
    return Reconciliation(overheads=new, unattributed_usu=found.unattributed_usu)


def _billed(connection: Connection, site: str, since: datetime, until: datetime) -> list[Billed]:
    """Return what was charged at a site, less what was given back of it."""
    query = (
        select(journal.c.at, func.sum(entries.c.amount_usu).label("amount_usu"))
        .join(entries, entries.c.journal_id == journal.c.id)
        .join(accounts, accounts.c.id == entries.c.account_id)
        .where(accounts.c.name == f"income:{site}", journal.c.at >= since, journal.c.at < until)
        .group_by(journal.c.id, journal.c.at)
        .order_by(journal.c.id)
    )
    return [
        Billed(site=site, at=row.at, amount_usu=int(row.amount_usu))
        for row in connection.execute(query)
    ]


def _to_job(row: Row[tuple[object, ...]]) -> EndedJob:
    return EndedJob(
        site=row.site,
        job=row.job,
        charge_usu=row.charge_usu,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )
