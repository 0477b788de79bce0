"""``fabric-admin db``."""

from __future__ import annotations

import click

from fabric.cli.admin.database import Books, database_options
from fabric.cli.output import Output, note


@click.group()
def db() -> None:
    """The hub's database.

    \b
    Example:
      fabric-admin db verify
    """


@db.command()
@database_options
def migrate(books: Books, output: Output) -> None:
    """Bring the database to this release's schema; every other command does so first, too.

    \b
    Example:
      fabric-admin db migrate --database sqlite:////srv/fabric/fabric.db
    """
    url = books.database.shown_url
    output.json({"database": url}) if output.is_json else note(f"{url} is up to date.")


@db.command()
@database_options
def verify(books: Books, output: Output) -> None:
    """Recompute every balance from the ledger's entries.

    \b
    Example:
      fabric-admin db verify --format json
    """
    books.ledger.verify()
    output.json({"consistent": True}) if output.is_json else note("The ledger adds up.")
