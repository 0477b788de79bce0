"""``fabric status``: is it there, who am I, what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.commands.sites import print_sites
from fabric.cli.options import client_options
from fabric.cli.output import Output

if TYPE_CHECKING:
    from fabric.sdk import Fabric


@click.command()
@client_options
def status(fabric: Fabric, output: Output) -> None:
    """Show the hub, who you are to it, and its sites."""
    me, known = fabric.whoami(), fabric.sites()
    if output.is_json:
        output.json({"base_url": fabric.base_url, "whoami": me, "sites": known})
        return
    ready = sum(replica.state == "ready" for site in known for replica in site.replicas)
    output.facts(
        [
            ("hub", fabric.base_url),
            ("project", me.project),
            ("key", f"{me.key} ({', '.join(me.scopes)})"),
            ("replicas", f"{ready} ready at {len(known)} sites"),
        ]
    )
    print_sites(output, known)
