"""``fabric up``: a hub and local sites on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), help="The hub's port; 0 takes a free one.")
@click.option(
    "--site",
    "names",
    multiple=True,
    default=("alpha", "beta"),
    show_default=True,
    help="A site to start; repeatable.",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The site file all of them follow (default: the shipped `local`).",
)
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where everything is kept.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1),
    default=300,
    show_default=True,
    help="Seconds until every site must be ready.",
)
@output_options
def up(
    port: int | None,
    names: tuple[str, ...],
    like: Path | None,
    state_dir: Path | None,
    timeout_s: float,
    output: Output,
) -> None:
    """Start a hub and local sites, and keep them running.

    Prints the address and a key; other `fabric` commands of this user find both by themselves.
    `fabric down` ends everything.
    """
    from fabric.cli import federation
    from fabric.cli.progress import watching
    from fabric.config import load_settings, load_site, shipped_sites

    settings = load_settings({"hub.port": port, "state_dir": state_dir})
    template = load_site(like or shipped_sites()["local"])
    plan = federation.get_plan(settings, template, names, timeout_s=timeout_s)
    with watching(plan) as watch:
        running = federation.start(plan, watch)
    if output.is_json:
        output.json(running.model_dump(include={"base_url", "api_key", "model"}))
        return
    output.facts(
        [
            ("export FABRIC_BASE_URL", running.base_url),
            ("export FABRIC_API_KEY", running.api_key),
        ]
    )
