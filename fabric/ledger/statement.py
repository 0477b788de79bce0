"""Statements: what a project was granted and charged, line by line."""

from __future__ import annotations

from datetime import datetime
from typing import get_args

from sqlalchemy import Connection, Select, func, or_, select

from fabric.ledger.allocations import balances
from fabric.ledger.records import LineKind, Statement, StatementLine
from fabric.ledger.tables import allocations, entries, job_charges, journal

_KINDS = get_args(LineKind)


def statement(
    connection: Connection,
    project: str,
    *,
    allocation: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
) -> Statement:
    """Return the newest ``limit`` lines of a period. See ``Ledger.statement``."""
    current = balances(connection, project=project, name=allocation)
    balance_usu = {a.name: a.available_usu + a.held_usu for a in current}
    if until is not None:
        later = _lines(project, allocation).where(journal.c.at >= until).subquery()
        totals = select(later.c.allocation, func.sum(later.c.amount_usu)).group_by(
            later.c.allocation
        )
        for name, total in connection.execute(totals):
            balance_usu[name] -= int(total)
    period = (
        _lines(project, allocation).order_by(journal.c.id.desc(), allocations.c.id).limit(limit + 1)
    )
    if since is not None:
        period = period.where(journal.c.at >= since)
    if until is not None:
        period = period.where(journal.c.at < until)
    rows = connection.execute(period).all()
    lines = []
    for row in rows[:limit]:
        amount_usu = int(row.amount_usu)
        lines.append(
            StatementLine(
                entry=row.id,
                at=row.at,
                kind=row.kind,
                allocation=row.allocation,
                amount_usu=amount_usu,
                balance_usu=balance_usu[row.allocation],
                run=row.hold_id,
                site=row.site,
                model=row.model,
                memo=row.memo,
                mends=row.mends_id,
                job=row.job,
            )
        )
        balance_usu[row.allocation] -= amount_usu
    return Statement(
        project=project,
        lines=tuple(reversed(lines)),
        allocations=tuple(current),
        complete=len(rows) <= limit,
    )


def _lines(project: str, allocation: str | None) -> Select[tuple[object, ...]]:
    own = (allocations.c.account_id, allocations.c.held_account_id)
    amount_usu = (
        select(func.coalesce(func.sum(entries.c.amount_usu), 0))
        .where(entries.c.journal_id == journal.c.id, entries.c.account_id.in_(own))
        .scalar_subquery()
    )
    either = or_(
        journal.c.allocation_id == allocations.c.id, journal.c.source_id == allocations.c.id
    )
    query = (
        select(
            journal,
            allocations.c.name.label("allocation"),
            amount_usu.label("amount_usu"),
            job_charges.c.job_id.label("job"),
        )
        .join(allocations, either)
        .outerjoin(job_charges, job_charges.c.journal_id == journal.c.id)
        .where(allocations.c.project == project, journal.c.kind.in_(_KINDS))
    )
    return query if allocation is None else query.where(allocations.c.name == allocation)
