"""Allocations: what a project may spend, at which site, in which period, and by whom."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, Select, bindparam, insert, or_, select, update

from fabric.errors import AllocationClosed, Duplicate, RequestInvalid, UnknownAccount
from fabric.ledger.posting import account_id
from fabric.ledger.records import AllocationBalance, is_open
from fabric.ledger.tables import accounts, allocations
from fabric.sql import Query

_OWN = ""
"""The project of what is the fabric's own; no real one has this name."""

_available = accounts.alias("available")
_held = accounts.alias("held")
_parents = allocations.alias("parents")


class AllocationRow(NamedTuple):
    """An allocation's ids and times, for postings."""

    id: int
    name: str
    project: str
    site: str
    parent_id: int | None
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


_ALLOCATION = Query(
    select(*(allocations.c[name] for name in AllocationRow._fields)).where(
        allocations.c.name == bindparam("name")
    ),
    AllocationRow,
)


def open_allocation(
    connection: Connection,
    project: str,
    site: str,
    period: str | None,
    starts_at: datetime | None,
    ends_at: datetime | None,
) -> str:
    """Create an allocation with nothing in it. See ``Ledger.open_allocation``."""
    for param, value in (("project", project), ("site", site), ("period", period)):
        if value is not None and (not value or ":" in value or "/" in value):
            reason = "it is empty or holds a colon or a slash"
            raise RequestInvalid(param=param, value=value, reason=reason)
    name = f"allocation:{project}:{site}" + ("" if period is None else f":{period}")
    _check_times(starts_at, ends_at)
    row = {"project": project, "site": site, "period": period}
    _insert(connection, name, row | {"starts_at": starts_at, "ends_at": ends_at})
    return name


def open_share(connection: Connection, parent: str, holder: str) -> str:
    """Create a share with nothing in it. See ``Ledger.open_share``."""
    if not holder or "/" in holder:
        raise RequestInvalid(param="holder", value=holder, reason="it is empty or holds a slash")
    row = find_allocation(connection, parent)
    if row.parent_id is not None:
        reason = "it is a share itself, which is not divided further"
        raise RequestInvalid(param="allocation", value=parent, reason=reason)
    name = f"{parent}/{holder}"
    same = {"project": row.project, "site": row.site, "holder": holder, "parent_id": row.id}
    times = {"starts_at": row.starts_at, "ends_at": row.ends_at}
    _insert(connection, name, same | times)
    return name


def own_allocation(connection: Connection, name: str, site: str) -> AllocationRow:
    """Return an allocation of the fabric's own, which no project has; opened if there is none."""
    if _ALLOCATION.first(connection, {"name": name}) is None:
        _insert(connection, name, {"project": _OWN, "site": site}, may_go_negative=True)
    return find_allocation(connection, name)


def find_allocation(connection: Connection, name: str) -> AllocationRow:
    """Return an allocation's ids and times.

    Raises:
        UnknownAccount: There is none of this name.
    """
    row = _ALLOCATION.first(connection, {"name": name})
    if row is None:
        raise UnknownAccount(account=name)
    return row


def set_times(
    connection: Connection, name: str, starts_at: datetime | None, ends_at: datetime | None
) -> None:
    """Change when an allocation and its shares are open. See ``Ledger.modify_allocation``."""
    row = find_allocation(connection, name)
    if row.parent_id is not None and (starts_at or ends_at):
        reason = "it is a share, which is open when its allocation is"
        raise RequestInvalid(param="allocation", value=name, reason=reason)
    starts_at, ends_at = starts_at or row.starts_at, ends_at or row.ends_at
    _check_times(starts_at, ends_at)
    connection.execute(
        update(allocations)
        .where(or_(allocations.c.id == row.id, allocations.c.parent_id == row.id))
        .values(starts_at=starts_at, ends_at=ends_at)
    )


def balances(
    connection: Connection, *, project: str | None = None, name: str | None = None
) -> list[AllocationBalance]:
    """Return projects' allocations with their balances, in order of name."""
    statement = _BALANCES.where(allocations.c.project != _OWN)
    if project is not None:
        statement = statement.where(allocations.c.project == project)
    if name is not None:
        statement = statement.where(allocations.c.name == name)
    return [AllocationBalance(**row._mapping) for row in connection.execute(statement)]


def payers(
    connection: Connection, project: str, caller: str, at: datetime
) -> list[AllocationBalance]:
    """Return what a caller may spend. See ``Ledger.payers``."""
    found = [one for one in balances(connection, project=project) if one.is_open(at)]
    shared = {one.parent for one in found if one.holder == caller}
    return [one for one in found if one.holder == caller or not (one.holder or one.name in shared)]


_BALANCES: Select[tuple[object, ...]] = (
    select(
        allocations.c.name,
        allocations.c.project,
        allocations.c.site,
        allocations.c.period,
        allocations.c.holder,
        _parents.c.name.label("parent"),
        _available.c.balance_usu.label("available_usu"),
        _held.c.balance_usu.label("held_usu"),
        allocations.c.starts_at,
        allocations.c.ends_at,
    )
    .join(_available, allocations.c.account_id == _available.c.id)
    .join(_held, allocations.c.held_account_id == _held.c.id)
    .outerjoin(_parents, allocations.c.parent_id == _parents.c.id)
    .order_by(allocations.c.name)
)


def _insert(
    connection: Connection, name: str, row: dict[str, object], *, may_go_negative: bool = False
) -> None:
    if _ALLOCATION.first(connection, {"name": name}) is not None:
        raise Duplicate(kind="allocation", name=name)
    ids = {
        "account_id": account_id(connection, name, may_go_negative=may_go_negative),
        "held_account_id": account_id(connection, f"held:{name}"),
    }
    connection.execute(insert(allocations), {"name": name} | row | ids)


def _check_times(starts_at: datetime | None, ends_at: datetime | None) -> None:
    if starts_at and ends_at and ends_at <= starts_at:
        raise RequestInvalid(
            param="ends_at", value=ends_at.isoformat(), reason="it is not after starts_at"
        )
