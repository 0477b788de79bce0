"""``fabric down``: end what ``fabric up`` started."""

from __future__ import annotations

from pathlib import Path

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note


@click.command()
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Which federation (default: yours)."
)
@output_options
def down(state_dir: Path | None, output: Output) -> None:
    """End the federation on this machine.

    Sites finish what they have, for a few seconds; then everything ends. The database with
    accounts and runs stays for the next `fabric up`.
    """
    from fabric.cli import federation
    from fabric.config import StateDir, load_settings

    state = StateDir(load_settings({"state_dir": state_dir}).state_dir)
    note("Ending the sites and the hub ...")
    ended = federation.stop(state)
    if output.is_json:
        output.json({"base_url": ended.base_url, "ended": ["hub", *ended.sites]})
    else:
        note(f"The federation at {ended.base_url} is down.")
