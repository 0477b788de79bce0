"""``fabric-admin maintenance``."""

from __future__ import annotations

from datetime import datetime

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import UTC_TIME, Books, database_options, day, yes_option
from fabric.cli.output import Output


@click.group()
def maintenance() -> None:
    """Times in which a site takes no requests.

    Before one begins, the site gets only what will be done by then; when it is over, requests come
    again by themselves.

    \b
    Example:
      fabric-admin maintenance show
    """


@maintenance.command()
@click.argument("site")
@click.option("--from", "starts_at", type=UTC_TIME, required=True, help="When it begins (UTC).")
@click.option("--until", "ends_at", type=UTC_TIME, required=True, help="When it is over (UTC).")
@click.option("--reason", default="", metavar="TEXT", help="What people read.")
@change_options
def add(
    site: str,
    starts_at: datetime,
    ends_at: datetime,
    reason: str,
    books: Books,
    change: Change,
) -> None:
    """Plan a maintenance of SITE.

    \b
    Example:
      fabric-admin maintenance add anvil --from 2027-01-11 --until 2027-01-12
    """
    added = books.catalog.add_maintenance(site, starts_at=starts_at, ends_at=ends_at, reason=reason)
    times = f"from {day(starts_at)} to {day(ends_at)} UTC"
    change.tell("planned", f"maintenance {added.id} of {site} {times}", added)


@maintenance.command()
@click.argument("site", required=False)
@database_options
def show(site: str | None, books: Books, output: Output) -> None:
    """List what is planned, at SITE or everywhere.

    \b
    Example:
      fabric-admin maintenance show anvil --format json
    """
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
@click.option("--from", "starts_at", type=UTC_TIME, help="When it begins (UTC).")
@click.option("--until", "ends_at", type=UTC_TIME, help="When it is over (UTC).")
@click.option("--reason", metavar="TEXT", help="What people read.")
@change_options
def modify(
    site: str,
    name: str,
    starts_at: datetime | None,
    ends_at: datetime | None,
    reason: str | None,
    books: Books,
    change: Change,
) -> None:
    """Change the maintenance ID of SITE, also one that is going on.

    \b
    Example:
      fabric-admin maintenance modify anvil mnt_1a2b3c4d --until 2027-01-13
    """
    options = {"--from": starts_at, "--until": ends_at, "--reason": reason}
    require_some("maintenance", name, options)
    planned = books.catalog.get_site(site).rules.maintenance
    before = next((one for one in planned if one.id == name), None)
    after = books.catalog.modify_maintenance(
        site, name, starts_at=starts_at, ends_at=ends_at, reason=reason
    )
    change.tell("changed", f"maintenance {name} of {site}", after, before=before)


@maintenance.command()
@click.argument("site")
@click.argument("name", metavar="ID")
@yes_option
@change_options
def delete(site: str, name: str, yes: bool, books: Books, change: Change) -> None:
    """Forget the maintenance ID of SITE; one that is going on is over at once.

    \b
    Example:
      fabric-admin maintenance delete anvil mnt_1a2b3c4d --dry-run
    """
    change.confirm(f"Delete the maintenance {name} of {site}?", yes=yes)
    deleted = books.catalog.delete_maintenance(site, name)
    change.tell("deleted", f"maintenance {name} of {site}", deleted)
