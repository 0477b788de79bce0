"""How fast allocations are being spent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from sqlalchemy import Connection, func, select

from fabric.ledger.tables import allocations, entries, journal

WINDOW = timedelta(days=7)
"""What was spent earlier says little of what will be."""
MIN_SPAN = timedelta(days=1)
"""A shorter time is taken for a day: an hour's burst is not a week's rate."""
MIN_CUT_SPAN = timedelta(hours=1)
"""The same where ``MAX_CHARGES`` cut it short."""
MAX_CHARGES = 20_000
"""The newest charges of an allocation that are summed, so that the look takes some 30 ms at
most."""


def burn_usu_per_day(connection: Connection, project: str, now: datetime) -> Mapping[str, float]:
    """Return what each allocation of a project was charged a day of late. See ``Ledger.burn``."""
    own = select(allocations).where(allocations.c.project == project)
    return {row.name: _burn(connection, row.id, now) for row in connection.execute(own).all()}


def _burn(connection: Connection, allocation_id: int, now: datetime) -> float:
    newest = (
        select(journal.c.id, journal.c.at)
        .where(journal.c.allocation_id == allocation_id, journal.c.kind == "charge")
        .order_by(journal.c.id.desc())
        .limit(MAX_CHARGES)
        .subquery()
    )
    recent = newest.c.at > now - WINDOW
    first_at, num = connection.execute(
        select(func.min(newest.c.at), func.count()).where(recent)
    ).one()
    if not num:
        return 0.0
    owned = (
        select(func.sum(entries.c.amount_usu))
        .join(newest, entries.c.journal_id == newest.c.id)
        .join(allocations, allocations.c.id == allocation_id)
        .where(
            recent,
            entries.c.account_id.in_([allocations.c.account_id, allocations.c.held_account_id]),
        )
    )
    spent_usu = -int(connection.execute(owned).scalar() or 0)
    least = MIN_SPAN if num < MAX_CHARGES else MIN_CUT_SPAN
    days: float = max(now - first_at, least) / timedelta(days=1)
    return spent_usu / days
