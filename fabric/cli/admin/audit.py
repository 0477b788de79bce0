"""``fabric-admin audit``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

import click

from fabric.cli.admin.database import UTC_TIME, Books, database_options, day
from fabric.cli.output import Column, Output, note
from fabric.errors import RequestInvalid

if TYPE_CHECKING:
    from fabric.audit import AuditEntry


@click.group()
def audit() -> None:
    """What administrators changed: who, what, before, after and when.

    \b
    Example:
      fabric-admin audit show --since 2030-01-01
    """


@audit.command()
@click.option("--since", type=UTC_TIME, help="Only from then on (UTC).")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@database_options
def show(since: datetime | None, limit: int, books: Books, output: Output) -> None:
    """List the latest changes, newest first; --format json has the rows.

    \b
    Example:
      fabric-admin audit show --limit 5
    """
    entries = books.audit.entries(since=since, limit=limit)
    if output.is_json:
        output.json(entries)
        return
    output.table(
        [Column("#", numeric=True), "AT (UTC)", "WHO", "WHAT", "ROWS"],
        [(e.seq, day(e.at), e.who, e.what, _summary(e)) for e in entries],
    )


@audit.command()
@click.option("--noted", metavar="SHA256", help="What an earlier check printed.")
@database_options
def verify(noted: str | None, books: Books, output: Output) -> None:
    """Check that no entry was changed, taken out or put in; print the last hash.

    Note it somewhere else, and give it back later as --noted.

    \b
    Example:
      fabric-admin audit verify > audit.sha256
    """
    if noted is not None and not re.fullmatch("[0-9a-f]{64}", noted):
        reason = "it is not a whole hash, 64 digits from 0 to f, as this command prints it"
        raise RequestInvalid(param="noted", value=noted, reason=reason)
    num_entries, sha256 = books.audit.verify(noted_sha256=noted)
    if output.is_json:
        output.json({"entries": num_entries, "sha256": sha256})
        return
    note(f"All {num_entries} entries are as they were written.")
    click.echo(sha256)


def _summary(entry: AuditEntry) -> str:
    gone, came = _tables(entry.before), _tables(entry.after)
    return " ".join(
        f"{'+' if table not in gone else '-' if table not in came else '~'}{table}"
        for table in sorted(gone | came)
    )


def _tables(rows: Iterable[object]) -> set[str]:
    return {str(row["table"]) for row in rows if isinstance(row, dict)}
