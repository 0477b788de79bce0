"""Allocations as commands name them: by project, site and period."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.admin.database import Books
from fabric.cli.output import Output, note
from fabric.errors import RequestInvalid, UnknownAccount

if TYPE_CHECKING:
    from fabric.ledger import AllocationBalance

site_option = click.option(
    "--site", default="*", help="Where it may be spent; anywhere if left out."
)
period_option = click.option(
    "--period", metavar="NAME", help="Of which period, such as 2027, where there are several."
)


def find(books: Books, project: str, site: str, period: str | None = None) -> AllocationBalance:
    """Return a project's allocation at a site: of this period, or the only one there is.

    Raises:
        UnknownAccount: There is none.
        RequestInvalid: There are several, and no period was named.
    """
    found = [
        one
        for one in books.ledger.allocations(project)
        if one.site == site and one.holder is None and period in (None, one.period)
    ]
    if not found:
        where = f"{project} at {site}" + ("" if period is None else f" for {period}")
        raise UnknownAccount(account=where)
    if len(found) > 1:
        periods = ", ".join(one.period or "(none)" for one in found)
        reason = f"{project} has several at {site}: {periods}; name one"
        raise RequestInvalid(param="period", value="", reason=reason)
    return found[0]


def report(sentence: str, name: str, books: Books, output: Output) -> None:
    """Tell what was done to an allocation, or print the allocation as JSON."""
    output.json(books.ledger.allocation(name)) if output.is_json else note(sentence)
