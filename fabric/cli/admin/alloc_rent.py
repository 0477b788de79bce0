"""``fabric-admin alloc rent``."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal

import click

from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import Books
from fabric.cli.money import su
from fabric.cli.output import Column, Output
from fabric.errors import Duplicate, InsufficientBalance, LedgerError

GIB = 2**30
STORING = ("adapters", "artifacts", "files")
"""The tables whose rows say how many bytes a project has at the hub."""


@click.command()
@undoable_options
def rent(books: Books, output: Output) -> None:
    """Charge projects for today's storage: adapters, artifacts, files of batches.

    It is for once a day, from cron, say: what was charged today is not charged again. The price
    is that of the model * at the site *; the first allocation pays that can, for any site.

    \b
    Example:
      fabric-admin alloc rent
    """
    from fabric.ledger import price_usu

    now = datetime.now(UTC)
    rate = books.ledger.rate("*", "*", now)
    rows = []
    for project, num_bytes in sorted(_stored_bytes(books).items()):
        gib = Decimal(num_bytes) / GIB
        amount_usu = price_usu(rate, "standard", {"stored_usu": gib})
        charged, state = 0, "nothing to pay"
        if amount_usu:
            try:
                charged, state = _charge(books, project, amount_usu, gib, now), "charged"
            except Duplicate:
                state = "charged today already"
            except LedgerError as error:
                state = error.message
        rows.append((project, f"{gib:.6f}", su(charged), state))
    names = ("project", "gib", "su", "state")
    if output.is_json:
        output.json([dict(zip(names, row, strict=True)) for row in rows])
        return
    output.table(
        ["PROJECT", Column("GIB", numeric=True), Column("SU", numeric=True), "STATE"],
        rows,
        empty="Nothing is stored.",
    )


def _charge(books: Books, project: str, amount_usu: int, gib: Decimal, now: datetime) -> int:
    """Charge a day's storage to the first allocation that can pay it; return the amount.

    Raises:
        InsufficientBalance: None can.
        Duplicate: Another amount was charged today.
    """
    payers = [
        one
        for one in books.ledger.payers(project, "", now)
        if one.site == "*" and one.available_usu >= amount_usu
    ]
    key = f"rent:{project}:{now:%Y-%m-%d}"
    if not payers:
        raise InsufficientBalance(
            account=f"allocation:{project}:*", needed_usu=amount_usu, available_usu=0
        )
    memo = f"{gib:.6f} GiB stored for a day"
    books.ledger.charge(payers[0].name, amount_usu, key=key, site="hub", memo=memo)
    return amount_usu


def _stored_bytes(books: Books) -> Counter[str]:
    from sqlalchemy import func, select

    import fabric.adapters
    import fabric.artifacts
    import fabric.batches  # noqa: F401 - the rooms declare their tables when they are imported
    from fabric.sql import metadata

    stored: Counter[str] = Counter()
    with books.database.read() as connection:
        for name in STORING:
            table = metadata.tables[name]
            sums = select(table.c.project, func.sum(table.c.num_bytes)).group_by(table.c.project)
            for project, num_bytes in connection.execute(sums):
                stored[project] += int(num_bytes)
    return stored
