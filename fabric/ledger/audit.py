"""The audit: recompute from the entries what the ledger otherwise takes from its caches."""

from __future__ import annotations

from sqlalchemy import Connection, Integer, func, select

from fabric.errors import LedgerInconsistent
from fabric.ledger.records import HoldState
from fabric.ledger.tables import accounts, allocations, entries, holds, journal


def verify(connection: Connection) -> None:
    """Check every sum the ledger promises.

    Raises:
        LedgerInconsistent: An account, a journal row or a set of holds does not add up.
    """
    problems = [*_unequal_balances(connection), *_unbalanced(connection)]
    problems += [*_unequal_holds(connection), *_unequal_charges(connection)]
    if problems:
        raise LedgerInconsistent(problems=problems)


def _unequal_balances(connection: Connection) -> list[str]:
    total = func.coalesce(func.sum(entries.c.amount_usu), 0)
    query = (
        select(accounts.c.name, accounts.c.balance_usu, total)
        .outerjoin(entries, entries.c.account_id == accounts.c.id)
        .group_by(accounts.c.id)
        .having(accounts.c.balance_usu != total)
    )
    return [
        f"{name} has a balance of {balance} where its entries sum to {total}"
        for name, balance, total in connection.execute(query)
    ]


def _unbalanced(connection: Connection) -> list[str]:
    total = func.sum(entries.c.amount_usu)
    query = select(entries.c.journal_id, total).group_by(entries.c.journal_id).having(total != 0)
    return [f"journal row {row} sums to {total}" for row, total in connection.execute(query)]


def _unequal_holds(connection: Connection) -> list[str]:
    held = func.coalesce(func.sum(holds.c.amount_usu), 0)
    query = (
        select(accounts.c.name, accounts.c.balance_usu, held)
        .select_from(allocations)
        .join(accounts, accounts.c.id == allocations.c.held_account_id)
        .outerjoin(
            holds, (holds.c.allocation_id == allocations.c.id) & (holds.c.state == HoldState.OPEN)
        )
        .group_by(accounts.c.id)
        .having(accounts.c.balance_usu != held)
    )
    return [
        f"{name} has a balance of {balance} where its open holds sum to {held}"
        for name, balance, held in connection.execute(query)
    ]


def _unequal_charges(connection: Connection) -> list[str]:
    num_charges = func.count(journal.c.id)
    query = (
        select(holds.c.id, num_charges)
        .outerjoin(journal, (journal.c.hold_id == holds.c.id) & (journal.c.kind == "charge"))
        .group_by(holds.c.id, holds.c.state)
        .having(num_charges != (holds.c.state == HoldState.SETTLED).cast(Integer))
    )
    return [f"the hold {hold} was charged {num} times" for hold, num in connection.execute(query)]
