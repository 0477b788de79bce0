"""``fabric-admin key``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import (
    UTC_TIME,
    Books,
    check_future,
    database_options,
    yes_option,
)
from fabric.cli.options import Command
from fabric.cli.output import Column, Output, note, to_json

if TYPE_CHECKING:
    from fabric.auth import KeyRecord

PROGRAM_SCOPES = ("program:read", "program:write", "program:gradient", "program:weights")
SCOPES = ("query", "admin", "site", "launch", *PROGRAM_SCOPES)


def scope_option(
    scopes: Sequence[str], text: str, *, default: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Return ``--scope``, which is repeatable and one of these."""
    return click.option(
        "--scope",
        "scopes",
        type=click.Choice(scopes),
        multiple=True,
        default=default,
        metavar="SCOPE",
        help=text,
    )


@click.group()
def key() -> None:
    """API keys of a project.

    \b
    Example:
      fabric-admin key add astro --label laptop --expires 2030-01-01
    """


@key.command()
@click.argument("project")
@click.option("--label", default="", metavar="TEXT", help="What it is for.")
@scope_option(
    SCOPES,
    f"What it may do: {', '.join(SCOPES)}. Repeatable; query by default.",
    default=["query"],
)
@click.option("--site", help="The site an agent's key (--scope site) is bound to.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once.")
@click.option("--expires", "expires_at", type=UTC_TIME, help="When it ends (UTC).")
@change_options
def add(
    project: str,
    label: str,
    scopes: tuple[str, ...],
    site: str | None,
    max_concurrent: int | None,
    expires_at: datetime | None,
    books: Books,
    change: Change,
) -> None:
    """Add a key to PROJECT and print it: this is the only time it can be seen.

    Each call makes another key, whatever its label.

    \b
    Example:
      fabric-admin key add astro --scope site --site anvil > anvil.key
    """
    check_future("--expires", expires_at)
    if site is not None:
        books.catalog.get_site(site)
    limit = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
    record, secret = books.keys.add_key(
        project, label=label, scopes=scopes, site=site, expires_at=expires_at, **limit
    )
    if change.is_dry_run:
        change.tell("added", f"key of {project}", record)
    elif change.output.is_json:
        change.output.json({**to_json(record), "key": secret})
    else:
        note(f"The key {record.id} of {project} was added. Keep it now: it is not shown again.")
        click.echo(secret)


@key.command()
@click.argument("key_id", required=False)
@click.option("--project", help="Only the keys of this project.")
@database_options
def show(key_id: str | None, project: str | None, books: Books, output: Output) -> None:
    """List the keys, or show one; never the secret.

    \b
    Example:
      fabric-admin key show --project astro
    """
    if key_id:
        output.record(books.keys.key(key_id))
        return
    records = books.keys.keys(project)
    if output.is_json:
        output.json(records)
        return
    output.table(
        [Column("KEY", whole=True), "PROJECT", "LABEL", "SCOPES", "SITE", "ENDS (UTC)"],
        [(k.id, k.project, k.label, " ".join(sorted(k.scopes)), k.site, _ends(k)) for k in records],
    )


@key.command()
@click.argument("key_id")
@click.option("--label", metavar="TEXT", help="What it is for.")
@scope_option(SCOPES, "Replaces the old ones; repeatable.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once.")
@click.option("--expires", "expires_at", type=UTC_TIME, help="When it ends (UTC).")
@change_options
def modify(
    key_id: str,
    label: str | None,
    scopes: tuple[str, ...],
    max_concurrent: int | None,
    expires_at: datetime | None,
    books: Books,
    change: Change,
) -> None:
    """Change a key; running hubs notice within a second.

    \b
    Example:
      fabric-admin key modify 5b1e0c7a94d2 --max-concurrent 8
    """
    check_future("--expires", expires_at)
    options = {"--label": label, "--scope": scopes, "--max-concurrent": max_concurrent}
    require_some("key", key_id, {**options, "--expires": expires_at})
    before = books.keys.key(key_id)
    after = books.keys.modify(
        key_id,
        label=label,
        scopes=scopes or None,
        max_concurrent=max_concurrent,
        expires_at=expires_at,
    )
    change.tell("changed", f"key {key_id}", after, before=before)


@key.command()
@click.argument("key_id")
@yes_option
@change_options
def delete(key_id: str, yes: bool, books: Books, change: Change) -> None:
    """Revoke a key for good; running hubs notice within a second.

    \b
    Example:
      fabric-admin key delete 5b1e0c7a94d2 --yes
    """
    before = books.keys.key(key_id)
    change.confirm(f"Revoke the key {key_id} ({before.label or 'no label'})?", yes=yes)
    after = books.keys.revoke(key_id)
    change.tell("revoked", f"key {key_id}", after, before=before)


def _ends(key: KeyRecord) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "never"
    return "expired" if key.expires_at <= datetime.now(UTC) else f"{key.expires_at:%Y-%m-%d}"
