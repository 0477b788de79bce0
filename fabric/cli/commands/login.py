"""``fabric login``: a Globus login for the hub, kept on this machine."""

from __future__ import annotations

import webbrowser

import click

from fabric.cli.commands.whoami import print_caller
from fabric.cli.options import output_options
from fabric.cli.output import Output, note
from fabric.errors import FabricError


@click.command()
@click.option("--base-url", metavar="URL", help="The hub's address.")
@click.option("--no-browser", is_flag=True, help="Only print the address to log in at.")
@output_options
def login(base_url: str | None, no_browser: bool, output: Output) -> None:
    """Log in to the hub with Globus.

    Opens the address to log in at, and reads the code that is shown there afterwards. The login
    lasts until `fabric logout`, or six months without use.
    """
    from fabric.config import load_settings
    from fabric.sdk import Fabric
    from fabric.sdk.login import Login

    def ask(url: str) -> str:
        click.echo(f"Log in with Globus here:\n\n{url}\n", err=True)
        if not no_browser:
            webbrowser.open(url)
        code: str = click.prompt("Code", err=True)
        return code

    settings = load_settings({"client.base_url": base_url})
    session = Login(settings.client, settings.state_dir)
    try:
        if session.is_service:
            session.token()
        else:
            session.log_in(ask)
    finally:
        session.close()
    note(f"Logged in to {settings.client.base_url}.")
    if settings.client.api_key:
        source = settings.origins["client.api_key"].source
        note(f"There is an API key too (from {source}); it is used instead of the login.")
    with Fabric(base_url) as fabric:
        try:
            print_caller(fabric, output)
        except FabricError as error:
            # The login itself is good.
            note(error.message)
