"""``fabric sites``: where models run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, short

if TYPE_CHECKING:
    from fabric.sdk import Fabric, Site


@click.command()
@client_options
def sites(fabric: Fabric, output: Output) -> None:
    """List the sites with their replicas and load."""
    known = fabric.sites()
    if output.is_json:
        output.json(known)
        return
    print_sites(output, known)


def print_sites(output: Output, known: tuple[Site, ...]) -> None:
    """Print a line a replica, and one for a site without any."""
    output.table(
        [
            *("SITE", "STATE", "MODEL", "INSTANCE"),
            *(Column("RUNNING", numeric=True), Column("WAITING", numeric=True)),
            *(Column("CACHE", numeric=True), "DETAIL"),
        ],
        [row for site in known for row in _rows(site)],
        empty="The hub has no sites; an administrator adds them with `fabric-admin site add`.",
    )


def _rows(site: Site) -> list[tuple[object, ...]]:
    if not site.replicas:
        return [(site.name, site.state, "", "", "", "", "", site.detail)]
    return [
        (
            site.name,
            replica.state,
            replica.model,
            short(replica.instance),
            replica.num_running,
            replica.num_waiting,
            f"{replica.cache_usage:.0%}",
            site.detail,
        )
        for replica in site.replicas
    ]
