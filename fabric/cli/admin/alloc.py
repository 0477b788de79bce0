"""``fabric-admin alloc``."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from fabric.cli.admin.alloc_moves import exchange, refund, share, statement
from fabric.cli.admin.alloc_rent import rent
from fabric.cli.admin.allocations import find, period_option, report, site_option
from fabric.cli.admin.amounts import amount_options, optional_amount
from fabric.cli.admin.balance import balance
from fabric.cli.admin.change import require_some, undoable_options
from fabric.cli.admin.database import (
    UTC_TIME,
    Books,
    check_future,
    confirm,
    database_options,
    day,
    yes_option,
)
from fabric.cli.money import su
from fabric.cli.output import Column, Output
from fabric.errors import RequestInvalid

times = [
    click.option("--starts", "starts_at", type=UTC_TIME, help="When it opens (UTC)."),
    click.option("--ends", "ends_at", type=UTC_TIME, help="When it closes (UTC)."),
]


@click.group()
def alloc() -> None:
    """What a project may spend, at a site or anywhere, in a period.

    \b
    Example:
      fabric-admin alloc add astro --su 500 --period 2027 --ends 2028-01-01
    """


for command in (balance, share, exchange, refund, rent, statement):
    alloc.add_command(command)


@alloc.command()
@click.argument("project")
@site_option
@period_option
@times[0]
@times[1]
@click.option("--memo", default="", metavar="TEXT", help="Why; the statement shows it.")
@undoable_options
@amount_options
def add(
    project: str,
    site: str,
    period: str | None,
    amount_usu: int,
    starts_at: datetime | None,
    ends_at: datetime | None,
    memo: str,
    books: Books,
    output: Output,
) -> None:
    """Open an allocation for PROJECT and grant it an amount. What is unused when it ends lapses.

    \b
    Example:
      fabric-admin alloc add astro --site alpha --amount '100 node-hour'
    """
    check_future("--ends", ends_at)
    books.keys.project(project)
    if site != "*":
        books.catalog.get_site(site)
    with books.database.transaction():
        name = books.ledger.open_allocation(
            project, site, period=period, starts_at=starts_at, ends_at=ends_at
        )
        books.ledger.grant(name, amount_usu, memo=memo)
    report(f"Opened {name} with {su(amount_usu)} SU.", name, books, output)


@alloc.command()
@click.option("--project", help="Only those of this project.")
@database_options
def show(project: str | None, books: Books, output: Output) -> None:
    """List allocations and shares, with what is available and what is held for requests.

    \b
    Example:
      fabric-admin alloc show --project astro
    """
    records = books.ledger.allocations(project)
    if output.is_json:
        output.json(records)
        return
    now = datetime.now(UTC)
    output.table(
        [
            *("PROJECT", "SITE", "PERIOD", "SHARE OF", "STATE"),
            *(Column("AVAILABLE SU", numeric=True), Column("HELD SU", numeric=True)),
            "ENDS (UTC)",
        ],
        [
            (
                *(a.project, a.site, a.period, a.holder),
                "open" if a.is_open(now) else "closed",
                *(su(a.available_usu), su(a.held_usu), day(a.ends_at, "never")),
            )
            for a in records
        ],
    )


@alloc.command()
@click.argument("project")
@site_option
@period_option
@times[0]
@times[1]
@click.option("--memo", default="", metavar="TEXT", help="Why; the statement shows it.")
@undoable_options
@optional_amount
def modify(
    project: str,
    site: str,
    period: str | None,
    amount_usu: int | None,
    starts_at: datetime | None,
    ends_at: datetime | None,
    memo: str,
    books: Books,
    output: Output,
) -> None:
    """Grant more, take back (--su -5), or change when an allocation is open.

    \b
    Example:
      fabric-admin alloc modify astro --period 2027 --ends 2028-03-01
    """
    check_future("--ends", ends_at)
    amount = dict.fromkeys(("--su", "--amount"), amount_usu or None)
    require_some("allocation", project, {**amount, "--starts": starts_at, "--ends": ends_at})
    allocation = find(books, project, site, period)
    with books.database.transaction():
        if amount_usu and amount_usu > 0:
            books.ledger.grant(allocation.name, amount_usu, memo=memo)
        elif amount_usu:
            if allocation.available_usu < -amount_usu:
                reason = f"only {su(allocation.available_usu)} SU are not held or spent"
                raise RequestInvalid(param="su", value=su(amount_usu), reason=reason)
            books.ledger.withdraw(allocation.name, -amount_usu, memo=memo)
        books.ledger.modify_allocation(allocation.name, starts_at=starts_at, ends_at=ends_at)
    report(f"Changed {allocation.name}.", allocation.name, books, output)


@alloc.command()
@click.argument("project")
@site_option
@period_option
@yes_option
@undoable_options
def delete(
    project: str, site: str, period: str | None, yes: bool, books: Books, output: Output
) -> None:
    """Close an allocation and take back what is not held; its entries stay on record.

    \b
    Example:
      fabric-admin alloc delete astro --site alpha -y
    """
    name = find(books, project, site, period).name
    shares = [one.name for one in books.ledger.allocations(project) if one.parent == name]
    left_usu = sum(books.ledger.allocation(one).available_usu for one in (name, *shares))
    confirm(f"Close {name} and take back {su(left_usu)} SU?", yes=yes)
    with books.database.transaction():
        for one in (*shares, name):
            if left_usu := books.ledger.allocation(one).available_usu:
                books.ledger.withdraw(one, left_usu, memo="allocation closed")
        books.ledger.modify_allocation(name, ends_at=datetime.now(UTC))
    report(f"Closed {name}.", name, books, output)
