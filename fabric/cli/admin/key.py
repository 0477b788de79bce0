"""``fabric-admin key``."""

from __future__ import annotations

from datetime import datetime

import click

from fabric.cli.admin.database import (
    UTC_TIME,
    Books,
    confirm,
    database_options,
    day,
    yes_option,
)
from fabric.cli.output import Column, Output, note, to_json

PROGRAM_SCOPES = ("program:read", "program:write", "program:gradient", "program:weights")
SCOPES = click.Choice(["query", "admin", "site", "launch", *PROGRAM_SCOPES])


@click.group()
def key() -> None:
    """API keys of a project."""


@key.command()
@click.argument("project")
@click.option("--label", default="", metavar="TEXT", help="What it is for.")
@click.option("--scope", "scopes", type=SCOPES, multiple=True, default=["query"], show_default=True)
@click.option("--site", help="The site an agent's key (--scope site) is bound to.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once.")
@click.option("--expires", "expires_at", type=UTC_TIME, help="When it ends (UTC).")
@database_options
def add(
    project: str,
    label: str,
    scopes: tuple[str, ...],
    site: str | None,
    max_concurrent: int | None,
    expires_at: datetime | None,
    books: Books,
    output: Output,
) -> None:
    """Add a key to PROJECT and print it: this is the only time it can be seen."""
    if site is not None:
        books.catalog.get_site(site)
    limit = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
    record, secret = books.keys.add_key(
        project, label=label, scopes=scopes, site=site, expires_at=expires_at, **limit
    )
    if output.is_json:
        output.json({**to_json(record), "key": secret})
        return
    note(f"Added the key {record.id} of {project}. Keep it now: it is not shown again.")
    click.echo(secret)


@key.command()
@click.argument("key_id", required=False)
@click.option("--project", help="Only the keys of this project.")
@database_options
def show(key_id: str | None, project: str | None, books: Books, output: Output) -> None:
    """List the keys, or show one; never the secret."""
    records = [books.keys.key(key_id)] if key_id else books.keys.keys(project)
    if output.is_json:
        output.json(records[0] if key_id else records)
        return
    output.table(
        [
            *("KEY", "PROJECT", "LABEL", "SCOPES", "SITE"),
            *(Column("AT ONCE", numeric=True), "EXPIRES (UTC)", "REVOKED (UTC)"),
        ],
        [
            (
                *(k.id, k.project, k.label, " ".join(sorted(k.scopes)), k.site),
                *(k.max_concurrent, day(k.expires_at, "never"), day(k.revoked_at)),
            )
            for k in records
        ],
    )


@key.command()
@click.argument("key_id")
@click.option("--label", metavar="TEXT")
@click.option("--scope", "scopes", type=SCOPES, multiple=True, help="Replaces the old ones.")
@click.option("--max-concurrent", type=click.IntRange(min=1))
@click.option("--expires", "expires_at", type=UTC_TIME, help="When it ends (UTC).")
@database_options
def modify(
    key_id: str,
    label: str | None,
    scopes: tuple[str, ...],
    max_concurrent: int | None,
    expires_at: datetime | None,
    books: Books,
    output: Output,
) -> None:
    """Change a key."""
    record = books.keys.modify(
        key_id,
        label=label,
        scopes=scopes or None,
        max_concurrent=max_concurrent,
        expires_at=expires_at,
    )
    output.json(record) if output.is_json else note(f"Changed the key {key_id}.")


@key.command()
@click.argument("key_id")
@yes_option
@database_options
def delete(key_id: str, yes: bool, books: Books, output: Output) -> None:
    """Revoke a key for good; running hubs notice within a second."""
    record = books.keys.key(key_id)
    confirm(f"Revoke the key {key_id} ({record.label or 'no label'})?", yes=yes)
    record = books.keys.revoke(key_id)
    output.json(record) if output.is_json else note(f"Revoked the key {key_id}.")
