"""How amounts come into allocations, go from one to another, come back and lapse."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, bindparam, func, select

from fabric.errors import InsufficientBalance, NotCharged, RefundExceedsCharge, RequestInvalid
from fabric.ledger.allocations import AllocationRow, find_allocation
from fabric.ledger.posting import account_id, is_posted, post
from fabric.ledger.records import Refund
from fabric.ledger.tables import accounts, allocations, entries, holds, journal

GRANTS = "grants"
"""Where granted amounts come from; what projects were ever given, below zero."""

EXPIRED = "expired"
"""Where unused amounts go when their period is over."""

_ENDED = (
    select(allocations.c.name, accounts.c.balance_usu)
    .join(accounts, accounts.c.id == allocations.c.account_id)
    .where(allocations.c.ends_at <= bindparam("now"), accounts.c.balance_usu > 0)
    .order_by(allocations.c.id)
)
_LAPSED_SHARES = _ENDED.where(allocations.c.parent_id.is_not(None))
_LAPSED = _ENDED.where(allocations.c.parent_id.is_(None))
_ACCOUNT = select(allocations.c.account_id).where(allocations.c.id == bindparam("id"))
_CHARGE = (
    select(
        journal.c.id,
        journal.c.site,
        journal.c.model,
        holds.c.charged_usu,
        allocations.c.id.label("allocation_id"),
        allocations.c.name.label("allocation"),
        allocations.c.account_id,
    )
    .join(holds, holds.c.id == journal.c.hold_id)
    .join(allocations, allocations.c.id == holds.c.allocation_id)
    .where(journal.c.hold_id == bindparam("run"), journal.c.kind == "charge")
    .with_for_update(of=holds)
)
_REFUNDED = (
    select(func.coalesce(func.sum(entries.c.amount_usu), 0))
    .join(journal, journal.c.id == entries.c.journal_id)
    .where(journal.c.mends_id == bindparam("charge"), entries.c.amount_usu > 0)
)
_UNDER_KEY = (
    select(entries.c.amount_usu)
    .join(journal, journal.c.id == entries.c.journal_id)
    .where(
        journal.c.mends_id == bindparam("charge"),
        journal.c.key == bindparam("key"),
        entries.c.amount_usu > 0,
    )
)


def grant(
    connection: Connection, name: str, amount_usu: int, at: datetime, key: str | None, memo: str
) -> None:
    """Move an amount into an allocation, or back where it is negative.

    An allocation's comes from the grants, a share's from what its allocation has available.
    """
    row = find_allocation(connection, name)
    came = amount_usu >= 0
    if row.parent_id is None:
        source = account_id(connection, GRANTS, may_go_negative=True)
        kind = "grant" if came else "withdrawal"
    else:
        source = _account_of(connection, row)
        kind = "share" if came else "return"
    post(
        connection,
        {source: -amount_usu, row.account_id: amount_usu},
        kind=kind,
        at=at,
        allocation_id=row.id,
        source_id=row.parent_id,
        key=key,
        memo=memo,
    )


def exchange(
    connection: Connection,
    source: str,
    target: str,
    amount_usu: int,
    at: datetime,
    key: str | None,
    memo: str,
) -> None:
    """Move an amount between two allocations of a project. See ``Ledger.exchange``."""
    from_, to = find_allocation(connection, source), find_allocation(connection, target)
    for param, row in (("source", from_), ("target", to)):
        if row.parent_id is not None:
            reason = "it is a share, which only its allocation gives to and takes from"
            raise RequestInvalid(param=param, value=row.name, reason=reason)
    if from_.project != to.project or from_.id == to.id:
        reason = f"it is not another allocation of the project {from_.project}"
        raise RequestInvalid(param="target", value=target, reason=reason)
    deltas_usu = {from_.account_id: -amount_usu, to.account_id: amount_usu}
    if key is not None and is_posted(connection, key, "exchange", deltas_usu):
        return
    from_.check_open(at)
    to.check_open(at)
    post(
        connection,
        deltas_usu,
        kind="exchange",
        at=at,
        allocation_id=to.id,
        source_id=from_.id,
        key=key,
        memo=memo,
    )


def charge(
    connection: Connection,
    name: str,
    amount_usu: int,
    at: datetime,
    key: str,
    site: str,
    memo: str,
) -> None:
    """Charge what no run was held for. See ``Ledger.charge``."""
    row = find_allocation(connection, name)
    deltas_usu = {row.account_id: -amount_usu, account_id(connection, f"income:{site}"): amount_usu}
    if is_posted(connection, key, "charge", deltas_usu):
        return
    row.check_open(at)
    post(
        connection,
        deltas_usu,
        kind="charge",
        at=at,
        allocation_id=row.id,
        key=key,
        site=site,
        memo=memo,
    )


def refund(
    connection: Connection,
    run: str,
    amount_usu: int | None,
    at: datetime,
    key: str | None,
    memo: str,
) -> Refund:
    """Give back of what a run was charged. See ``Ledger.refund``."""
    charge = connection.execute(_CHARGE, {"run": run}).first()
    if charge is None:
        raise NotCharged(run=run)
    refunded_usu = int(connection.execute(_REFUNDED, {"charge": charge.id}).scalar_one())
    if amount_usu is None:  # all that was left, when this was first said
        first_usu = connection.execute(_UNDER_KEY, {"charge": charge.id, "key": key}).scalar()
        amount_usu = first_usu or charge.charged_usu - refunded_usu
    deltas_usu = {
        account_id(connection, f"income:{charge.site}"): -amount_usu,
        charge.account_id: amount_usu,
    }
    if key is not None and is_posted(connection, key, "refund", deltas_usu):
        amount_usu = 0
    elif refunded_usu + amount_usu > charge.charged_usu:
        raise RefundExceedsCharge(
            run=run,
            amount_usu=amount_usu,
            charged_usu=charge.charged_usu,
            refunded_usu=refunded_usu,
        )
    elif amount_usu:
        post(
            connection,
            deltas_usu,
            kind="refund",
            at=at,
            allocation_id=charge.allocation_id,
            hold_id=run,
            mends_id=charge.id,
            key=key,
            site=charge.site,
            model=charge.model,
            memo=memo,
        )
    return Refund(
        run=run,
        allocation=charge.allocation,
        refunded_usu=refunded_usu + amount_usu,
        charged_usu=charge.charged_usu,
    )


def expire(connection: Connection, now: datetime) -> list[str]:
    """Take what is unused out of allocations whose time is over. See ``Ledger.expire``."""
    lapsed = []
    for over in (_LAPSED_SHARES, _LAPSED):  # shares first: what is theirs goes back
        for one in connection.execute(over, {"now": now}).all():
            try:
                with connection.begin_nested():
                    _lapse(connection, find_allocation(connection, one.name), one.balance_usu, now)
            except InsufficientBalance:
                continue  # Only PostgreSQL lets another hub be quicker; it took it.
            lapsed.append(one.name)
    return lapsed


def _lapse(connection: Connection, row: AllocationRow, amount_usu: int, now: datetime) -> None:
    is_share = row.parent_id is not None
    target = _account_of(connection, row) if is_share else account_id(connection, EXPIRED)
    post(
        connection,
        {row.account_id: -amount_usu, target: amount_usu},
        kind="return" if is_share else "expiry",
        at=now,
        allocation_id=row.id,
        source_id=row.parent_id,
        memo="the period is over",
    )


def _account_of(connection: Connection, share: AllocationRow) -> int:
    """Return the account of a share's allocation."""
    return int(connection.execute(_ACCOUNT, {"id": share.parent_id}).scalar_one())
