"""``fabric whoami``: who the hub takes you for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.options import client_options
from fabric.cli.output import Output
from fabric.errors import ProjectNotChosen

if TYPE_CHECKING:
    from fabric.sdk import Fabric


@click.command()
@client_options
def whoami(fabric: Fabric, output: Output) -> None:
    """Show who you are to the hub, for which projects you act, and until when."""
    print_caller(fabric, output)


def print_caller(fabric: Fabric, output: Output) -> None:
    """Print who the hub takes the client for; having projects but choosing none is an answer.

    Raises:
        FabricError: The hub does not know the caller, or cannot be reached.
    """
    try:
        me = fabric.whoami()
    except ProjectNotChosen as error:
        known = error.detail
        if output.is_json:
            output.json({"auth": "globus", "project": None, **known})
            return
        facts = [
            ("user", known["user"]),
            ("project", "none chosen: use --project or FABRIC_PROJECT"),
            ("projects", _listed(known["projects"])),
            ("by", "Globus login"),
            ("until", known["expires_at"]),
        ]
    else:
        if output.is_json:
            output.json(me)
            return
        facts = [
            ("user", me.user or f"API key {me.key}"),
            ("project", me.project),
            ("projects", _listed(me.projects)),
            ("may", ", ".join(me.scopes)),
            ("by", "Globus login" if me.auth == "globus" else "API key"),
            ("until", me.expires_at or "it is revoked"),
        ]
    output.facts([("hub", fabric.base_url), *facts])


def _listed(projects: object) -> str:
    return ", ".join(projects) if isinstance(projects, list | tuple) else str(projects)
