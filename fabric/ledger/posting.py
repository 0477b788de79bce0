"""The one way entries come into the ledger: a posting that sums to zero and overdraws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import NamedTuple, NoReturn

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Connection,
    bindparam,
    case,
    cast,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from fabric.errors import Duplicate, InsufficientBalance, RequestInvalid
from fabric.ledger.tables import accounts, entries, journal
from fabric.sql import Prepared, Query

MAX_AMOUNT_USU = 10**15
"""The largest single amount, a thousand million SU: sums stay far inside 64 bits."""


class _Row(NamedTuple):
    id: int


_JOURNAL = Query(
    insert(journal).returning(journal.c.id),
    _Row,
    columns=[column.name for column in journal.c if column.name != "id"],
)
_OPEN = {
    "sqlite": sqlite.insert(accounts).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(accounts).on_conflict_do_nothing(),
}
_BY_KEY = select(journal.c.id, journal.c.kind).where(journal.c.key == bindparam("key"))
_ENTRIES_OF = select(entries).where(entries.c.journal_id == bindparam("journal"))
_ACCOUNT_ID = select(accounts.c.id).where(accounts.c.name == bindparam("name"))


def post(
    connection: Connection,
    deltas_usu: Mapping[int, int],
    *,
    kind: str,
    at: datetime,
    allocation_id: int,
    source_id: int | None = None,
    hold_id: str | None = None,
    mends_id: int | None = None,
    key: str | None = None,
    site: str | None = None,
    model: str | None = None,
    memo: str = "",
) -> None:
    """Write one journal row and its entries, and move the balances.

    Accounts are taken in order of id, so that two postings never wait for each other in a circle.

    Args:
        connection: The transaction it is part of.
        deltas_usu: The signed amount of each account, by account id. They sum to zero.
        kind: What it is.
        at: When.
        allocation_id: Whose line it is on a statement.
        source_id: The other allocation whose line it is.
        hold_id: The run it belongs to.
        mends_id: The journal row that it corrects.
        key: Its name, if it has one: what was posted under it is not posted again.
        site: Where the work was done.
        model: What did it.
        memo: Why.

    Raises:
        InsufficientBalance: An account would become negative; the caller's transaction is undone.
        Duplicate: Something else was posted under this key.
    """
    if sum(deltas_usu.values()):
        raise AssertionError("A posting sums to zero.")
    ordered = sorted(deltas_usu.items())
    if key is not None and is_posted(connection, key, kind, deltas_usu):
        return
    changes = [(account, delta) for account, delta in ordered if delta]
    numbered = _numbered(changes)
    if changes:
        _move(connection, changes, numbered)
    row = {
        "kind": kind,
        "at": at,
        "allocation_id": allocation_id,
        "source_id": source_id,
        "hold_id": hold_id,
        "mends_id": mends_id,
        "key": key,
        "site": site,
        "model": model,
        "memo": memo,
    }
    (written,) = _JOURNAL.all(connection, row)
    if changes:
        _entries(len(changes)).run(connection, {"journal": written.id, **numbered})


def account_id(connection: Connection, name: str, *, may_go_negative: bool = False) -> int:
    """Return the account of this name, opened with a balance of 0 if there is none."""
    known = connection.execute(_ACCOUNT_ID, {"name": name}).scalar()
    if known is None:
        row = {"name": name, "balance_usu": 0, "may_go_negative": may_go_negative}
        connection.execute(_OPEN[connection.dialect.name], row)
        known = connection.execute(_ACCOUNT_ID, {"name": name}).scalar_one()
    return int(known)


def check_amount(amount_usu: int, *, least: int = 0) -> None:
    """Refuse an amount that no posting may have.

    Raises:
        RequestInvalid: It is not an integer from ``least`` to ``MAX_AMOUNT_USU``.
    """
    is_integer = isinstance(amount_usu, int) and not isinstance(amount_usu, bool)
    if not is_integer or not least <= amount_usu <= MAX_AMOUNT_USU:
        raise RequestInvalid(
            param="amount_usu",
            value=amount_usu,
            reason=f"an amount is a whole number of micro-SU from {least} to {MAX_AMOUNT_USU}",
        )


def is_posted(connection: Connection, key: str, kind: str, deltas_usu: Mapping[int, int]) -> bool:
    """Return whether this very posting was made under this key before.

    Raises:
        Duplicate: Another was.
    """
    row = connection.execute(_BY_KEY, {"key": key}).first()
    if row is None:
        return False
    written = {
        entry.account_id: entry.amount_usu
        for entry in connection.execute(_ENTRIES_OF, {"journal": row.id})
    }
    asked = {account: delta for account, delta in deltas_usu.items() if delta}
    if (row.kind, written) != (kind, asked):
        raise Duplicate(kind="posting", name=key)
    return True


def _move(
    connection: Connection, changes: Sequence[tuple[int, int]], numbered: Mapping[str, int]
) -> None:
    """Move balances, in order of account; the transaction is undone if one would be overdrawn."""
    moved = {row.id for row in _moves(len(changes)).all(connection, numbered)}
    for account, delta in changes:
        if account not in moved:
            _refuse(connection, account, delta)


def _numbered(changes: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Return changes as the values of a statement for as many."""
    values: dict[str, int] = {}
    for number, (account, delta) in enumerate(changes):
        values |= {f"account_{number}": account, f"delta_{number}": delta}
    return values


@cache
def _entries(num: int) -> Prepared:
    """Return the statement that writes so many entries of a journal row."""
    lines: list[dict[str, object]] = [
        {
            "journal_id": bindparam("journal"),
            "account_id": bindparam(f"account_{number}"),
            "amount_usu": bindparam(f"delta_{number}"),
        }
        for number in range(num)
    ]
    return Prepared(insert(entries).values(lines))


@cache
def _moves(num: int) -> Query[_Row]:
    """Return the statement that moves so many balances, and returns which it moved."""
    named: list[tuple[BindParameter[int], BindParameter[int]]] = [
        (bindparam(f"account_{number}", type_=BigInteger), bindparam(f"delta_{number}"))
        for number in range(num)
    ]
    delta = case(*((accounts.c.id == account, delta) for account, delta in named))
    moved = accounts.c.balance_usu + cast(delta, BigInteger)
    # PostgreSQL locks rows in the order in which it meets them.
    locked = (
        select(accounts.c.id)
        .where(accounts.c.id.in_([account for account, _ in named]))
        .order_by(accounts.c.id)
        .with_for_update()
    )
    return Query(
        update(accounts)
        .where(accounts.c.id.in_(locked), or_(moved >= 0, accounts.c.may_go_negative))
        .values(balance_usu=moved)
        .returning(accounts.c.id),
        _Row,
    )


def _refuse(connection: Connection, account: int, delta: int) -> NoReturn:
    row = connection.execute(
        select(accounts.c.name, accounts.c.balance_usu).where(accounts.c.id == account)
    ).one()
    raise InsufficientBalance(account=row.name, needed_usu=-delta, available_usu=row.balance_usu)
