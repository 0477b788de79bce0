"""``fabric logout``: the end of a Globus login."""

from __future__ import annotations

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note


@click.command()
@click.option("--base-url", metavar="URL", help="The hub's address.")
@output_options
def logout(base_url: str | None, output: Output) -> None:
    """Forget the Globus login for the hub and revoke its tokens.

    The hub may go on accepting a revoked token for a minute.
    """
    from fabric.config import load_settings
    from fabric.sdk.login import Login

    settings = load_settings({"client.base_url": base_url})
    session = Login(settings.client, settings.state_dir)
    try:
        revoked = session.log_out()
    finally:
        session.close()
    if output.is_json:
        output.json({"base_url": settings.client.base_url, "revoked": revoked})
    elif revoked:
        note(f"Logged out of {settings.client.base_url}.")
    else:
        note("The login is forgotten here. Globus could not be asked to revoke its tokens.")
