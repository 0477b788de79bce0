"""``fabric-admin replica``."""

from __future__ import annotations

import click

from fabric.cli.admin.change import Change, change_options
from fabric.cli.admin.database import Books, database_options, day, yes_option
from fabric.cli.output import Column, Output


@click.group()
def replica() -> None:
    """Instances that serve, or may join: one a launch. Sites' agents add them.

    \b
    Example:
      fabric-admin replica show --site anvil
    """


@replica.command()
@click.argument("instance", required=False)
@click.option("--site", help="Only those of this site.")
@click.option("--all", "ended", is_flag=True, help="Also those that have ended.")
@database_options
def show(instance: str | None, site: str | None, ended: bool, books: Books, output: Output) -> None:
    """List the replicas, or show one.

    \b
    Example:
      fabric-admin replica show --all
    """
    if instance:
        output.record(books.catalog.launch(instance))
        return
    if site is not None:
        books.catalog.get_site(site)
    records = books.catalog.launches(site=site, ended=ended)
    if output.is_json:
        output.json(records)
        return
    output.table(
        [Column("INSTANCE", whole=True), "SITE", "MODEL", "STATE", "SINCE (UTC)"],
        [(r.instance, r.site, r.model, r.state, day(r.created_at)) for r in records],
    )


@replica.command()
@click.argument("instance")
@click.option("--reason", default="an administrator ended it", metavar="TEXT", help="Why.")
@yes_option
@change_options
def delete(instance: str, reason: str, yes: bool, books: Books, change: Change) -> None:
    """End a replica: it finishes what it runs, and may not come back.

    Running hubs notice within seconds. A site's agent starts another in its place; to have none
    there, disable the site.

    \b
    Example:
      fabric-admin replica delete inst_88f050b7c2d14f0e --reason "wrong weights"
    """
    before = books.catalog.launch(instance)
    change.confirm(f"End the replica {instance} at {before.site}?", yes=yes)
    after = books.catalog.end_launch(instance, reason)
    change.tell("ended", f"replica {instance}", after, before=before)
