"""The one way entries come into the ledger: a posting that sums to zero and overdraws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NoReturn

from sqlalchemy import Connection, bindparam, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from fabric.errors import InsufficientBalance, RequestInvalid
from fabric.ledger.tables import accounts, entries, journal

MAX_AMOUNT_USU = 10**15
"""The largest single amount, a thousand million SU: sums stay far inside 64 bits."""

_MOVE = (
    update(accounts)
    .where(
        accounts.c.id == bindparam("account"),
        or_(
            accounts.c.balance_usu + bindparam("delta") >= 0,
            accounts.c.may_go_negative,
        ),
    )
    .values(balance_usu=accounts.c.balance_usu + bindparam("delta"))
)
_JOURNAL = insert(journal).returning(journal.c.id)
_ENTRIES = insert(entries)
_OPEN = {
    "sqlite": sqlite.insert(accounts).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(accounts).on_conflict_do_nothing(),
}
_ACCOUNT_ID = select(accounts.c.id).where(accounts.c.name == bindparam("name"))


def post(
    connection: Connection,
    deltas_usu: Mapping[int, int],
    *,
    kind: str,
    at: datetime,
    allocation_id: int,
    hold_id: str | None = None,
    site: str | None = None,
    model: str | None = None,
    memo: str = "",
) -> int:
    """Write one journal row and its entries, and move the balances; return the row's id.

    Accounts are taken in order of id, so that two postings never wait for each other in a circle.

    Args:
        connection: The transaction it is part of.
        deltas_usu: The signed amount of each account, by account id. They sum to zero.

    Raises:
        InsufficientBalance: An account would become negative; the caller's transaction is undone.
    """
    if sum(deltas_usu.values()):
        raise AssertionError("A posting sums to zero.")
    ordered = sorted(deltas_usu.items())
    for account, delta in ordered:
        if delta and not connection.execute(_MOVE, {"account": account, "delta": delta}).rowcount:
            _refuse(connection, account, delta)
    row = {
        "kind": kind,
        "at": at,
        "allocation_id": allocation_id,
        "hold_id": hold_id,
        "site": site,
        "model": model,
        "memo": memo,
    }
    journal_id = connection.execute(_JOURNAL, row).scalar_one()
    lines = [
        {"journal_id": journal_id, "account_id": account, "amount_usu": delta}
        for account, delta in ordered
        if delta
    ]
    if lines:
        connection.execute(_ENTRIES, lines)
    return int(journal_id)


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


def _refuse(connection: Connection, account: int, delta: int) -> NoReturn:
    row = connection.execute(
        select(accounts.c.name, accounts.c.balance_usu).where(accounts.c.id == account)
    ).one()
    raise InsufficientBalance(account=row.name, needed_usu=-delta, available_usu=row.balance_usu)
