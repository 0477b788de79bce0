"""``fabric-admin rate unit``."""

from __future__ import annotations

from datetime import datetime

import click

from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import UTC_TIME, Books, database_options, day
from fabric.cli.money import SU, su
from fabric.cli.output import Column, Output, note


@click.group()
def unit() -> None:
    """Units of other books, such as a centre's node-hour, and what they are worth in SU.

    \b
    Example:
      fabric-admin rate unit add node-hour --su 1.5
    """


@unit.command()
@click.argument("name")
@click.option("--su", "usu", type=SU, required=True, help="What one is worth, such as 1.5.")
@click.option("--from", "effective_from", type=UTC_TIME, help="From when on (UTC); now.")
@undoable_options
def add(name: str, usu: int, effective_from: datetime | None, books: Books, output: Output) -> None:
    """Say what one NAME is worth from a time on.

    \b
    Example:
      fabric-admin rate unit add gpu-hour --su 0.25 --from 2027-01-01
    """
    made = books.ledger.set_unit(name, usu, effective_from=effective_from)
    if output.is_json:
        output.json(made)
        return
    note(f"One {name} is worth {su(usu)} SU from {day(made.effective_from)}.")


@unit.command()
@database_options
def show(books: Books, output: Output) -> None:
    """List all worths of all units, the newest first.

    \b
    Example:
      fabric-admin rate unit show
    """
    found = books.ledger.units()
    if output.is_json:
        output.json(found)
        return
    output.table(
        ["UNIT", Column("SU", numeric=True), "FROM (UTC)"],
        [(one.name, su(int(one.usu)), day(one.effective_from)) for one in found],
    )
