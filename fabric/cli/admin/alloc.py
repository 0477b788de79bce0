"""``fabric-admin alloc``."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from fabric.cli.admin.balance import balance
from fabric.cli.admin.database import (
    UTC_TIME,
    Books,
    confirm,
    database_options,
    day,
    yes_option,
)
from fabric.cli.money import SU, su
from fabric.cli.output import Column, Output, note
from fabric.errors import RequestInvalid, UnknownAccount

site_option = click.option(
    "--site", default="*", help="Where it may be spent; anywhere if left out."
)
times = [
    click.option("--starts", "starts_at", type=UTC_TIME, help="When it opens (UTC)."),
    click.option("--ends", "ends_at", type=UTC_TIME, help="When it closes (UTC)."),
]


@click.group()
def alloc() -> None:
    """What a project may spend at a site, in SU."""


alloc.add_command(balance)


@alloc.command()
@click.argument("project")
@site_option
@click.option("--su", "amount_usu", type=SU, required=True, help="How much, such as 10 or 0.5.")
@times[0]
@times[1]
@click.option("--memo", default="", metavar="TEXT", help="Why; the statement shows it.")
@database_options
def add(
    project: str,
    site: str,
    amount_usu: int,
    starts_at: datetime | None,
    ends_at: datetime | None,
    memo: str,
    books: Books,
    output: Output,
) -> None:
    """Open an allocation for PROJECT and grant it SU."""
    books.keys.project(project)
    if site != "*":
        books.catalog.get_site(site)
    with books.database.transaction():
        name = books.ledger.open_allocation(project, site, starts_at=starts_at, ends_at=ends_at)
        books.ledger.grant(name, amount_usu, memo=memo)
    _report(f"Opened {name} with {su(amount_usu)} SU.", name, books, output)


@alloc.command()
@click.option("--project", help="Only those of this project.")
@database_options
def show(project: str | None, books: Books, output: Output) -> None:
    """List allocations with what is available and what is held for running requests."""
    records = books.ledger.allocations(project)
    if output.is_json:
        output.json(records)
        return
    now = datetime.now(UTC)
    output.table(
        [
            *("PROJECT", "SITE", "STATE"),
            *(Column("AVAILABLE SU", numeric=True), Column("HELD SU", numeric=True)),
            *("STARTS (UTC)", "ENDS (UTC)"),
        ],
        [
            (
                *(a.project, a.site, "open" if a.is_open(now) else "closed"),
                *(su(a.available_usu), su(a.held_usu)),
                *(day(a.starts_at, "open"), day(a.ends_at, "never")),
            )
            for a in records
        ],
    )


@alloc.command()
@click.argument("project")
@site_option
@click.option("--su", "amount_usu", type=SU, help="Grant so much more; negative takes it back.")
@times[0]
@times[1]
@click.option("--memo", default="", metavar="TEXT", help="Why; the statement shows it.")
@database_options
def modify(
    project: str,
    site: str,
    amount_usu: int | None,
    starts_at: datetime | None,
    ends_at: datetime | None,
    memo: str,
    books: Books,
    output: Output,
) -> None:
    """Grant more, take back, or change when an allocation is open."""
    name = _find(project, site, books)
    with books.database.transaction():
        if amount_usu and amount_usu > 0:
            books.ledger.grant(name, amount_usu, memo=memo)
        elif amount_usu:
            left_usu = books.ledger.allocation(name).available_usu
            if left_usu < -amount_usu:
                reason = f"only {su(left_usu)} SU are not held or spent"
                raise RequestInvalid(param="su", value=su(amount_usu), reason=reason)
            books.ledger.withdraw(name, -amount_usu, memo=memo)
        books.ledger.modify_allocation(name, starts_at=starts_at, ends_at=ends_at)
    _report(f"Changed {name}.", name, books, output)


@alloc.command()
@click.argument("project")
@site_option
@yes_option
@database_options
def delete(project: str, site: str, yes: bool, books: Books, output: Output) -> None:
    """Close an allocation and take back what is not held; its entries stay on record."""
    name = _find(project, site, books)
    left_usu = books.ledger.allocation(name).available_usu
    confirm(f"Close {name} and take back {su(left_usu)} SU?", yes=yes)
    with books.database.transaction():
        left_usu = books.ledger.allocation(name).available_usu
        if left_usu:
            books.ledger.withdraw(name, left_usu, memo="allocation closed")
        books.ledger.modify_allocation(name, ends_at=datetime.now(UTC))
    _report(f"Closed {name}.", name, books, output)


def _find(project: str, site: str, books: Books) -> str:
    for allocation in books.ledger.allocations(project):
        if allocation.site == site:
            return allocation.name
    raise UnknownAccount(account=f"{project} at {site}")


def _report(sentence: str, name: str, books: Books, output: Output) -> None:
    output.json(books.ledger.allocation(name)) if output.is_json else note(sentence)
