"""``fabric-admin alloc share``, ``exchange``, ``refund`` and ``statement``."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import TypedDict, Unpack
from uuid import UUID

import click

from fabric.cli.admin.allocations import find, period_option, report, site_option
from fabric.cli.admin.amounts import amount_options, optional_amount
from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import UTC_TIME, Books, database_options
from fabric.cli.money import su
from fabric.cli.options import Command
from fabric.cli.output import Column, Output, note, short
from fabric.cli.statement_csv import to_csv
from fabric.errors import Duplicate, NotFound, RequestInvalid

GLOBUS = "globus:"


class Entry(TypedDict):
    """What an entry is called, and why it is made."""

    key: str | None
    memo: str


def _entry_options(function: Command) -> Command:
    """Add ``--key`` and ``--memo``; the function gets them as the fields of an ``Entry``."""
    key = "The entry's name: what was made under it is not made again."
    memo = click.option("--memo", default="", metavar="TEXT", help="Why; statements show it.")
    return click.option("--key", metavar="NAME", help=key)(memo(function))


@click.command()
@click.argument("project")
@click.argument("holder")
@site_option
@period_option
@_entry_options
@undoable_options
@amount_options
def share(
    project: str,
    holder: str,
    site: str,
    period: str | None,
    amount_usu: int,
    books: Books,
    output: Output,
    **entry: Unpack[Entry],
) -> None:
    """Set a part of an allocation aside for one caller: HOLDER is a key's id or globus:UUID.

    The holder then spends this share, and the allocation no more. A negative amount returns.

    \b
    Example:
      fabric-admin alloc share astro 0a1b2c3d4e5f --su 20
    """
    if holder.startswith(GLOBUS):
        _check_uuid(holder)
    elif books.keys.key(holder).project != project:
        raise NotFound(kind="key", name=holder)
    allocation = find(books, project, site, period)
    name = f"{allocation.name}/{holder}"
    with books.database.transaction():
        with suppress(Duplicate):
            books.ledger.open_share(allocation.name, holder)
        if amount_usu < 0:
            books.ledger.withdraw(name, -amount_usu, **entry)
        else:
            books.ledger.grant(name, amount_usu, **entry)
    available_usu = books.ledger.allocation(name).available_usu
    report(f"{name} has {su(available_usu)} SU available.", name, books, output)


@click.command()
@click.argument("project")
@click.option("--from", "source", default="*", metavar="SITE", help="Anywhere if left out.")
@click.option("--to", "target", default="*", metavar="SITE", help="Anywhere if left out.")
@click.option("--from-period", metavar="NAME", help="Of which period.")
@click.option("--to-period", metavar="NAME", help="Of which period.")
@_entry_options
@undoable_options
@amount_options
def exchange(
    project: str,
    source: str,
    target: str,
    from_period: str | None,
    to_period: str | None,
    amount_usu: int,
    books: Books,
    output: Output,
    **entry: Unpack[Entry],
) -> None:
    """Move an amount from one allocation of PROJECT to another.

    \b
    Example:
      fabric-admin alloc exchange astro --to alpha --amount '4 node-hour'
    """
    from_ = find(books, project, source, from_period).name
    to = find(books, project, target, to_period).name
    books.ledger.exchange(from_, to, amount_usu, **entry)
    report(f"Moved {su(amount_usu)} SU from {from_} to {to}.", to, books, output)


@click.command()
@click.argument("run")
@_entry_options
@undoable_options
@optional_amount
def refund(
    run: str, amount_usu: int | None, books: Books, output: Output, **entry: Unpack[Entry]
) -> None:
    """Give back what RUN was charged: all that is left of it, or an amount.

    \b
    Example:
      fabric-admin alloc refund run_5f70 --su 0.5 --memo "node failed"
    """
    made = books.ledger.refund(run, amount_usu, **entry)
    if output.is_json:
        output.json(made)
        return
    given, charged = su(made.refunded_usu), su(made.charged_usu)
    note(f"{given} of the {charged} SU that {run} was charged are given back.")


@click.command()
@click.argument("project")
@click.option("--site", help="Of the allocation there; of all if left out.")
@period_option
@click.option("--since", type=UTC_TIME, help="The first time included (UTC).")
@click.option("--until", type=UTC_TIME, help="The first time no longer included (UTC).")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
@click.option("--csv", "as_csv", is_flag=True, help="Print lines for a spreadsheet.")
@database_options
def statement(
    project: str,
    site: str | None,
    period: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    as_csv: bool,
    books: Books,
    output: Output,
) -> None:
    """Show what PROJECT was granted and charged, and what came and went otherwise.

    \b
    Example:
      fabric-admin alloc statement astro --period 2027 --csv > astro-2027.csv
    """
    if as_csv and output.is_json:
        raise RequestInvalid(param="csv", value="--format json", reason="choose one of them")
    books.keys.project(project)
    one = site is not None or period is not None
    name = find(books, project, site or "*", period).name if one else None
    found = books.ledger.statement(project, allocation=name, since=since, until=until, limit=limit)
    if output.is_json:
        output.json(found)
    elif as_csv:
        click.echo(to_csv(found.lines), nl=False)
    else:
        output.table(
            [
                *("WHEN (UTC)", "WHAT", "SITE", "RUN OR MEMO"),
                *(Column("SU", numeric=True), Column("BALANCE SU", numeric=True)),
            ],
            [
                (
                    *(f"{line.at:%Y-%m-%d %H:%M}", line.kind, line.site),
                    short(line.run) if line.run else line.memo[:24],
                    *(su(line.amount_usu), su(line.balance_usu)),
                )
                for line in found.lines
            ],
            empty="Nothing was granted or charged.",
        )
    if not found.complete:
        note("There are older lines; --limit shows more.")


def _check_uuid(holder: str) -> None:
    """Refuse a login that no caller can have: its share could never be spent."""
    name = holder.removeprefix(GLOBUS)
    try:
        is_uuid = name == str(UUID(name))
    except ValueError:
        is_uuid = False
    if not is_uuid:
        reason = "a login is globus: and the UUID of its identity, in lower case"
        raise RequestInvalid(param="holder", value=holder, reason=reason)
