"""``fabric demo``: a federation from nothing to the bill."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output


@click.command()
@output_options
def demo(output: Output) -> None:  # noqa: ARG001 - every command takes --format and -v
    """Watch a federation answer, lose a site, and answer again.

    Starts a hub and the sites alpha and beta in a temporary directory, asks one question through
    each way in, kills alpha, asks again, prints the account's statement, and ends everything.
    """
    from rich.console import Console

    from fabric.cli import demo as demonstration
    from fabric.cli import federation
    from fabric.cli.progress import watching
    from fabric.config import load_settings, load_site, shipped_sites

    with tempfile.TemporaryDirectory(prefix="fabric-demo-") as folder:
        settings = load_settings({"state_dir": Path(folder) / "state", "hub.port": 0})
        template = load_site(shipped_sites()["local"])
        plan = federation.get_plan(settings, template, ["alpha", "beta"], timeout_s=300)
        with watching(plan) as watch:
            running = federation.start(plan, watch)
        try:
            demonstration.run(running, Console(), Path(folder) / "parsl")
        finally:
            federation.stop(plan.state_dir)
