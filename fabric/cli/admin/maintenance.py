"""``fabric-admin maintenance``."""

from __future__ import annotations

from datetime import datetime

import click

from fabric.cli.admin.database import UTC_TIME, Books, confirm, database_options, day, yes_option
from fabric.cli.output import Output, note


@click.group()
def maintenance() -> None:
    """Times in which a site takes no requests.

    Before one begins, the site gets only what will be done by then; when it is over, requests come
    again by themselves.
    """


@maintenance.command()
@click.argument("site")
@click.option("--from", "starts_at", type=UTC_TIME, required=True, help="When it begins (UTC).")
@click.option("--until", "ends_at", type=UTC_TIME, required=True, help="When it is over (UTC).")
@click.option("--reason", default="", metavar="TEXT", help="What people read.")
@database_options
def add(
    site: str,
    starts_at: datetime,
    ends_at: datetime,
    reason: str,
    books: Books,
    output: Output,
) -> None:
    """Plan a maintenance of SITE.

    Example: fabric-admin maintenance add polaris --from "2027-01-11 08:00:00"
    --until "2027-01-11 18:00:00" --reason "new file system"
    """
    added = books.catalog.add_maintenance(site, starts_at=starts_at, ends_at=ends_at, reason=reason)
    if output.is_json:
        output.json(added)
        return
    note(f"{site} takes no requests from {day(starts_at)} to {day(ends_at)} UTC ({added.id}).")


@maintenance.command()
@click.argument("site", required=False)
@database_options
def show(site: str | None, books: Books, output: Output) -> None:
    """List what is planned, at SITE or everywhere, what was is included."""
    sites = [books.catalog.get_site(site)] if site else books.catalog.sites()
    planned = [(one.name, each) for one in sites for each in one.rules.maintenance]
    if output.is_json:
        output.json([{"site": name, **each.model_dump(mode="json")} for name, each in planned])
        return
    output.table(
        ["SITE", "ID", "FROM (UTC)", "UNTIL (UTC)", "REASON"],
        [
            (name, each.id, day(each.starts_at), day(each.ends_at), each.reason)
            for name, each in planned
        ],
        empty="No maintenance is planned.",
    )


@maintenance.command()
@click.argument("site")
@click.argument("name", metavar="ID")
@yes_option
@database_options
def delete(site: str, name: str, yes: bool, books: Books, output: Output) -> None:
    """Forget the maintenance ID of SITE; one that is going on is over at once."""
    confirm(f"Delete the maintenance {name} of {site}?", yes=yes)
    deleted = books.catalog.delete_maintenance(site, name)
    output.json(deleted) if output.is_json else note(f"Deleted the maintenance {name} of {site}.")
