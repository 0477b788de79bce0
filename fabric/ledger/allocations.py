"""Allocations: what a project may spend at a site, and how amounts get there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Select, bindparam, insert, select, update

from fabric.errors import AllocationClosed, Duplicate, RequestInvalid, UnknownAccount
from fabric.ledger.posting import account_id, post
from fabric.ledger.records import AllocationBalance, is_open
from fabric.ledger.tables import accounts, allocations

GRANTS = "grants"
"""Where granted amounts come from; the only account that goes negative."""

ANY_SITE = "*"

_available = accounts.alias("available")
_held = accounts.alias("held")
_ALLOCATION = select(
    allocations.c.id,
    allocations.c.account_id,
    allocations.c.held_account_id,
    allocations.c.starts_at,
    allocations.c.ends_at,
).where(allocations.c.name == bindparam("name"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationRow:
    """An allocation's ids and times, for postings."""

    id: int
    name: str
    account_id: int
    held_account_id: int
    starts_at: datetime | None
    ends_at: datetime | None

    def check_open(self, at: datetime) -> None:
        """Refuse an allocation whose time has not come or is over.

        Raises:
            AllocationClosed: It is not open at ``at``.
        """
        if not is_open(self.starts_at, self.ends_at, at):
            raise AllocationClosed(
                account=self.name,
                starts_at=None if self.starts_at is None else self.starts_at.isoformat(),
                ends_at=None if self.ends_at is None else self.ends_at.isoformat(),
            )


def open_allocation(
    connection: Connection,
    project: str,
    site: str,
    starts_at: datetime | None,
    ends_at: datetime | None,
) -> str:
    """Create an allocation with nothing in it and return its name.

    Raises:
        Duplicate: The project has one at this site.
        RequestInvalid: A name is empty or holds a colon, or the times are in the wrong order.
    """
    for param, value in (("project", project), ("site", site)):
        if not value or ":" in value:
            raise RequestInvalid(param=param, value=value, reason="it is empty or holds a colon")
    name = f"allocation:{project}:{site}"
    _check_times(starts_at, ends_at)
    if connection.execute(_ALLOCATION, {"name": name}).first() is not None:
        raise Duplicate(kind="allocation", name=name)
    connection.execute(
        insert(allocations),
        {
            "name": name,
            "project": project,
            "site": site,
            "account_id": account_id(connection, name),
            "held_account_id": account_id(connection, f"held:{name}"),
            "starts_at": starts_at,
            "ends_at": ends_at,
        },
    )
    return name


def find_allocation(connection: Connection, name: str) -> AllocationRow:
    """Return an allocation's ids and times.

    Raises:
        UnknownAccount: There is none of this name.
    """
    row = connection.execute(_ALLOCATION, {"name": name}).first()
    if row is None:
        raise UnknownAccount(account=name)
    return AllocationRow(name=name, **row._mapping)


def set_times(
    connection: Connection, name: str, starts_at: datetime | None, ends_at: datetime | None
) -> None:
    """Change when an allocation is open; ``None`` leaves a time as it is.

    Raises:
        UnknownAccount: There is none of this name.
        RequestInvalid: The times are in the wrong order.
    """
    row = find_allocation(connection, name)
    starts_at, ends_at = starts_at or row.starts_at, ends_at or row.ends_at
    _check_times(starts_at, ends_at)
    connection.execute(
        update(allocations)
        .where(allocations.c.id == row.id)
        .values(starts_at=starts_at, ends_at=ends_at)
    )


def grant(connection: Connection, name: str, amount_usu: int, at: datetime, memo: str) -> None:
    """Move an amount from the grants into an allocation, or back where it is negative.

    Raises:
        UnknownAccount: There is no such allocation.
        InsufficientBalance: More was to be taken back than is available.
    """
    row = find_allocation(connection, name)
    post(
        connection,
        {
            account_id(connection, GRANTS, may_go_negative=True): -amount_usu,
            row.account_id: amount_usu,
        },
        kind="grant" if amount_usu >= 0 else "withdrawal",
        at=at,
        allocation_id=row.id,
        memo=memo,
    )


def balances(
    connection: Connection, *, project: str | None = None, name: str | None = None
) -> list[AllocationBalance]:
    """Return allocations with their balances, in order of name."""
    statement = _BALANCES
    if project is not None:
        statement = statement.where(allocations.c.project == project)
    if name is not None:
        statement = statement.where(allocations.c.name == name)
    return [AllocationBalance(**row._mapping) for row in connection.execute(statement)]


_BALANCES: Select[tuple[object, ...]] = (
    select(
        allocations.c.name,
        allocations.c.project,
        allocations.c.site,
        _available.c.balance_usu.label("available_usu"),
        _held.c.balance_usu.label("held_usu"),
        allocations.c.starts_at,
        allocations.c.ends_at,
    )
    .join(_available, allocations.c.account_id == _available.c.id)
    .join(_held, allocations.c.held_account_id == _held.c.id)
    .order_by(allocations.c.name)
)


def _check_times(starts_at: datetime | None, ends_at: datetime | None) -> None:
    if starts_at and ends_at and ends_at <= starts_at:
        raise RequestInvalid(
            param="ends_at", value=ends_at.isoformat(), reason="it is not after starts_at"
        )
