"""``fabric-admin user``."""

from __future__ import annotations

from datetime import datetime

import click

from fabric.cli.admin.database import UTC_TIME, Books, database_options
from fabric.cli.money import su
from fabric.cli.output import Column, Output


@click.group()
def user() -> None:
    """Who asks: keys, and people who log in with Globus.

    A key is added and ended by `fabric-admin key`. People come and go as members of
    the Globus groups of a project (`fabric-admin project group`).

    \b
    Example:
      fabric-admin user show --project astro
    """


@user.command()
@click.option("--project", metavar="NAME", help="Only those of this project.")
@click.option("--since", type=UTC_TIME, help="Only what was asked since then (UTC).")
@database_options
def show(project: str | None, since: datetime | None, books: Books, output: Output) -> None:
    """List who has asked, how much, and when last; the latest first.

    \b
    Example:
      fabric-admin user show --since 2030-01-01 --format json
    """
    if project is not None:
        books.keys.project(project)
    found = books.catalog.users(project, since=since)
    if output.is_json:
        output.json(found)
        return
    output.table(
        [
            *("USER", "PROJECT", Column("RUNS", numeric=True), Column("SU", numeric=True)),
            "LAST (UTC)",
        ],
        [
            (u.key_id, u.project, u.num_runs, su(u.charge_usu), f"{u.last_at:%Y-%m-%d}")
            for u in found
        ],
    )
