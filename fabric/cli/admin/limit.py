"""``fabric-admin limit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.admin.change import Change, change_options
from fabric.cli.admin.database import Books, database_options, yes_option
from fabric.cli.options import Command
from fabric.cli.output import Column, Output
from fabric.errors import Duplicate, NotFound

if TYPE_CHECKING:
    from fabric.auth import Limit

_OPTIONS = {
    "requests_per_min": ("--requests", "Requests a minute."),
    "tokens_per_min": ("--tokens", "Tokens a minute, both ways."),
    "max_concurrent": ("--concurrent", "Requests at once."),
}


def _bounds(function: Command) -> Command:
    """Add an option for every bound; those not given are ``None``."""
    positive = click.IntRange(min=1)
    for name, (option, text) in reversed(_OPTIONS.items()):
        function = click.option(option, name, type=positive, metavar="N", help=text)(function)
    return function


@click.group()
def limit() -> None:
    """How much a project, key or login may ask.

    SUBJECT is project:NAME, key:ID or user:NAME@DOMAIN; with * in place of the name it
    holds for each that has no limit of its own.

    \b
    Example:
      fabric-admin limit add 'key:*' --requests 600 --tokens 200000
    """


@limit.command()
@click.argument("subject")
@_bounds
@change_options
def add(subject: str, books: Books, change: Change, **given: int | None) -> None:
    """Limit SUBJECT.

    \b
    Example:
      fabric-admin limit add project:astro --requests 2000 --concurrent 64
    """

    def make() -> Limit:
        if books.grants.limits(subject):
            raise Duplicate(kind="limit", name=subject)
        return books.grants.set_limit(subject, **given)

    change.add(f"limit of {subject}", make, lambda: _find(books, subject), given)


@limit.command()
@click.argument("subject", required=False)
@database_options
def show(subject: str | None, books: Books, output: Output) -> None:
    """List the limits, or show one.

    \b
    Example:
      fabric-admin limit show project:astro
    """
    if subject is not None:
        output.record(_find(books, subject))
        return
    records = books.grants.limits()
    if output.is_json:
        output.json(records)
        return
    heads = [Column(head, numeric=True) for head in ("REQUESTS/MIN", "TOKENS/MIN", "AT ONCE")]
    rows = [(r.subject, r.requests_per_min, r.tokens_per_min, r.max_concurrent) for r in records]
    output.table(["SUBJECT", *heads], rows)


@limit.command()
@click.argument("subject")
@_bounds
@change_options
def modify(subject: str, books: Books, change: Change, **given: int | None) -> None:
    """Change a limit; what is left out stays as it is.

    \b
    Example:
      fabric-admin limit modify project:astro --tokens 1000000
    """
    with books.database.transaction():
        before = _find(books, subject)
        bounds = {name: value or getattr(before, name) for name, value in given.items()}
        after = books.grants.set_limit(subject, **bounds)
    change.tell("changed", f"limit of {subject}", after, before=before)


@limit.command()
@click.argument("subject")
@yes_option
@change_options
def delete(subject: str, yes: bool, books: Books, change: Change) -> None:
    """Take a limit away.

    \b
    Example:
      fabric-admin limit delete project:astro --yes
    """
    change.confirm(f"Take away the limit of {subject}?", yes=yes)
    change.tell("deleted", f"limit of {subject}", books.grants.delete_limit(subject))


def _find(books: Books, subject: str) -> Limit:
    for found in books.grants.limits(subject):
        return found
    raise NotFound(kind="limit", name=subject)
