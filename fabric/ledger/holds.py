"""Holds: an amount set aside before a run, then charged or returned exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, insert, select, update

from fabric.errors import ChargeExceedsHold, Duplicate, HoldNotOpen
from fabric.ledger.allocations import find_allocation
from fabric.ledger.posting import account_id, post
from fabric.ledger.records import Hold, HoldState, Settlement
from fabric.ledger.tables import accounts, allocations, holds
from fabric.sql import Prepared, Query


class _Row(NamedTuple):
    """A hold, its allocation's accounts, and the account that its charge would go to."""

    id: str
    allocation_id: int
    amount_usu: int
    state: str
    lease_expires_at: datetime
    charged_usu: int | None
    site: str | None
    closed_at: datetime | None
    allocation: str
    account_id: int
    held_account_id: int
    income_id: int | None


_HOLD = Query(
    select(
        holds,
        allocations.c.name.label("allocation"),
        allocations.c.account_id,
        allocations.c.held_account_id,
        select(accounts.c.id)
        .where(accounts.c.name == bindparam("income", None))
        .scalar_subquery()
        .label("income_id"),
    )
    .join(allocations, holds.c.allocation_id == allocations.c.id)
    .where(holds.c.id == bindparam("hold"))
    .with_for_update(of=holds),
    _Row,
)
_INSERT = Prepared(
    insert(holds), columns=("id", "allocation_id", "amount_usu", "state", "lease_expires_at")
)
_EXPIRED = (
    select(holds.c.id)
    .where(holds.c.state == HoldState.OPEN, holds.c.lease_expires_at <= bindparam("now"))
    .order_by(holds.c.lease_expires_at)
    .with_for_update(skip_locked=True)
)
_RENEW = (
    update(holds)
    .where(holds.c.state == HoldState.OPEN, holds.c.id.in_(bindparam("holds", expanding=True)))
    .values(lease_expires_at=bindparam("until"))
    .returning(holds.c.id)
)
_MOVE = (
    update(holds)
    .where(holds.c.id == bindparam("hold"))
    .values(allocation_id=bindparam("to"), amount_usu=bindparam("amount"))
)
_CLOSE = Prepared(
    update(holds)
    .where(holds.c.id == bindparam("hold"))
    .values(
        state=bindparam("to"),
        charged_usu=bindparam("charged"),
        site=bindparam("at_site"),
        closed_at=bindparam("at"),
    )
)


def open_hold(
    connection: Connection,
    hold_id: str,
    allocation: str,
    amount_usu: int,
    lease_s: float,
    now: datetime,
) -> Hold:
    """Set an amount aside. See ``Ledger.hold``."""
    row = _HOLD.first(connection, {"hold": hold_id})
    if row is not None:
        if row.state != HoldState.OPEN:
            raise HoldNotOpen(hold=hold_id, state=row.state)
        if (row.allocation, row.amount_usu) != (allocation, amount_usu):
            raise Duplicate(kind="hold", name=hold_id)
        return _to_hold(row)
    source = find_allocation(connection, allocation)
    source.check_open(now)
    hold = Hold(
        id=hold_id,
        allocation=allocation,
        amount_usu=amount_usu,
        state=HoldState.OPEN,
        lease_expires_at=now + timedelta(seconds=lease_s),
    )
    _INSERT.run(
        connection,
        {
            "id": hold_id,
            "allocation_id": source.id,
            "amount_usu": amount_usu,
            "state": HoldState.OPEN,
            "lease_expires_at": hold.lease_expires_at,
        },
    )
    post(
        connection,
        {source.account_id: -amount_usu, source.held_account_id: amount_usu},
        kind="hold",
        at=now,
        allocation_id=source.id,
        hold_id=hold_id,
    )
    return hold


def move(
    connection: Connection, hold_id: str, allocation: str, amount_usu: int, now: datetime
) -> Hold:
    """Take a hold from another allocation. See ``Ledger.move_hold``."""
    row = _get_open(connection, hold_id)
    if (row.allocation, row.amount_usu) == (allocation, amount_usu):
        return _to_hold(row)
    target = find_allocation(connection, allocation)
    target.check_open(now)
    deltas_usu = Counter({row.held_account_id: -row.amount_usu, row.account_id: row.amount_usu})
    deltas_usu[target.account_id] -= amount_usu
    deltas_usu[target.held_account_id] += amount_usu
    connection.execute(_MOVE, {"hold": hold_id, "to": target.id, "amount": amount_usu})
    post(connection, deltas_usu, kind="move", at=now, allocation_id=target.id, hold_id=hold_id)
    return Hold(
        id=hold_id,
        allocation=allocation,
        amount_usu=amount_usu,
        state=HoldState.OPEN,
        lease_expires_at=row.lease_expires_at,
    )


def renew(
    connection: Connection, hold_ids: Sequence[str], lease_s: float, now: datetime
) -> list[str]:
    """Extend leases. See ``Ledger.renew``."""
    until = now + timedelta(seconds=lease_s)
    return list(connection.execute(_RENEW, {"holds": hold_ids, "until": until}).scalars())


def settle(
    connection: Connection,
    hold_id: str,
    amount_usu: int,
    *,
    site: str,
    model: str | None,
    memo: str,
    now: datetime,
) -> Settlement:
    """Charge a hold. See ``Ledger.settle``."""
    income = f"income:{site}"
    row = _HOLD.first(connection, {"hold": hold_id, "income": income})
    if row is not None and row.state == HoldState.SETTLED and row.charged_usu == amount_usu:
        assert row.site is not None
        assert row.closed_at is not None
        return Settlement(
            hold_id=hold_id,
            allocation=row.allocation,
            site=row.site,
            charged_usu=amount_usu,
            returned_usu=row.amount_usu - amount_usu,
            settled_at=row.closed_at,
        )
    row = _check_open(row, hold_id)
    if amount_usu > row.amount_usu:
        raise ChargeExceedsHold(hold=hold_id, amount_usu=amount_usu, held_usu=row.amount_usu)
    deltas_usu = {
        row.held_account_id: -row.amount_usu,
        row.account_id: row.amount_usu - amount_usu,
        row.income_id or account_id(connection, income): amount_usu,
    }
    _close(connection, row, HoldState.SETTLED, now, charged_usu=amount_usu, site=site)
    post(
        connection,
        deltas_usu,
        kind="charge",
        at=now,
        allocation_id=row.allocation_id,
        hold_id=hold_id,
        site=site,
        model=model,
        memo=memo,
    )
    return Settlement(
        hold_id=hold_id,
        allocation=row.allocation,
        site=site,
        charged_usu=amount_usu,
        returned_usu=row.amount_usu - amount_usu,
        settled_at=now,
    )


def void(connection: Connection, hold_id: str, now: datetime) -> None:
    """Return all of a hold. See ``Ledger.void``."""
    row = _HOLD.first(connection, {"hold": hold_id})
    if row is not None and row.state in (HoldState.VOIDED, HoldState.EXPIRED):
        return
    _return_all(connection, _check_open(row, hold_id), HoldState.VOIDED, now)


def release_expired(connection: Connection, now: datetime) -> list[str]:
    """Return all holds whose lease has passed. See ``Ledger.release_expired``."""
    expired = list(connection.execute(_EXPIRED, {"now": now}).scalars())
    for hold_id in expired:
        _return_all(connection, _get_open(connection, hold_id), HoldState.EXPIRED, now)
    return expired


def _return_all(connection: Connection, row: _Row, state: HoldState, now: datetime) -> None:
    _close(connection, row, state, now)
    post(
        connection,
        {row.held_account_id: -row.amount_usu, row.account_id: row.amount_usu},
        kind=state,
        at=now,
        allocation_id=row.allocation_id,
        hold_id=row.id,
    )


def _close(
    connection: Connection,
    row: _Row,
    state: HoldState,
    now: datetime,
    *,
    charged_usu: int | None = None,
    site: str | None = None,
) -> None:
    _CLOSE.run(
        connection,
        {"hold": row.id, "to": state, "charged": charged_usu, "at_site": site, "at": now},
    )


def _get_open(connection: Connection, hold_id: str) -> _Row:
    return _check_open(_HOLD.first(connection, {"hold": hold_id}), hold_id)


def _check_open(row: _Row | None, hold_id: str) -> _Row:
    if row is None or row.state != HoldState.OPEN:
        raise HoldNotOpen(hold=hold_id, state="unknown" if row is None else row.state)
    return row


def _to_hold(row: _Row) -> Hold:
    return Hold(
        id=row.id,
        allocation=row.allocation,
        amount_usu=row.amount_usu,
        state=HoldState(row.state),
        lease_expires_at=row.lease_expires_at,
    )
