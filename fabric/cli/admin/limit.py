"""``fabric-admin limit``."""

from __future__ import annotations

import click

from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import Books, confirm, database_options, yes_option
from fabric.cli.output import Column, Output, note
from fabric.errors import Duplicate, NotFound

POSITIVE = click.IntRange(min=1)
bounds = [
    click.option("--requests", type=POSITIVE, metavar="N", help="Requests a minute."),
    click.option("--tokens", type=POSITIVE, metavar="N", help="Tokens a minute, both ways."),
    click.option("--concurrent", type=POSITIVE, metavar="N", help="Requests at once."),
]


@click.group()
def limit() -> None:
    """How much a project or key may ask.

    \b
    SUBJECT is project:NAME, key:ID or user:NAME@DOMAIN; with * in place of the
    name it holds for each that has no limit of its own. Example:
      fabric-admin limit add 'key:*' --requests 600 --tokens 200000
    """


@limit.command()
@click.argument("subject")
@bounds[0]
@bounds[1]
@bounds[2]
@undoable_options
def add(
    subject: str,
    requests: int | None,
    tokens: int | None,
    concurrent: int | None,
    books: Books,
    output: Output,
) -> None:
    """Limit SUBJECT.

    \b
    Example:
      fabric-admin limit add project:astro --requests 600 --concurrent 32
    """
    with books.database.transaction():
        if books.grants.limits(subject):
            raise Duplicate(kind="limit", name=subject)
        record = books.grants.set_limit(
            subject, requests_per_min=requests, tokens_per_min=tokens, max_concurrent=concurrent
        )
    output.json(record) if output.is_json else note(f"Limited {record.subject}.")


@limit.command()
@click.argument("subject", required=False)
@database_options
def show(subject: str | None, books: Books, output: Output) -> None:
    """List the limits, or show one.

    \b
    Example:
      fabric-admin limit show project:astro
    """
    records = books.grants.limits(subject)
    if subject is not None and not records:
        raise NotFound(kind="limit", name=subject)
    if output.is_json:
        output.json(records[0] if subject else records)
        return
    heads = [Column(head, numeric=True) for head in ("REQUESTS/MIN", "TOKENS/MIN", "AT ONCE")]
    rows = [(r.subject, r.requests_per_min, r.tokens_per_min, r.max_concurrent) for r in records]
    output.table(["SUBJECT", *heads], rows)


@limit.command()
@click.argument("subject")
@bounds[0]
@bounds[1]
@bounds[2]
@undoable_options
def modify(
    subject: str,
    requests: int | None,
    tokens: int | None,
    concurrent: int | None,
    books: Books,
    output: Output,
) -> None:
    """Change a limit; what is left out stays as it is.

    \b
    Example:
      fabric-admin limit modify project:astro --tokens 200000
    """
    with books.database.transaction():
        if not (found := books.grants.limits(subject)):
            raise NotFound(kind="limit", name=subject)
        record = books.grants.set_limit(
            subject,
            requests_per_min=requests or found[0].requests_per_min,
            tokens_per_min=tokens or found[0].tokens_per_min,
            max_concurrent=concurrent or found[0].max_concurrent,
        )
    output.json(record) if output.is_json else note(f"Changed the limit of {record.subject}.")


@limit.command()
@click.argument("subject")
@yes_option
@undoable_options
def delete(subject: str, yes: bool, books: Books, output: Output) -> None:
    """Take a limit away.

    \b
    Example:
      fabric-admin limit delete project:astro --yes
    """
    confirm(f"Take away the limit of {subject}?", yes=yes)
    record = books.grants.delete_limit(subject)
    output.json(record) if output.is_json else note(f"{subject} has no limit any more.")
