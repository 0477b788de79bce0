"""``fabric logs``: what the user's own instances have written."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note

POLL_S = 0.5


@click.command()
@click.argument("name")
@click.option("--job", "job_id", help="A job of the launch.  [default: the newest]")
@click.option("--launcher", "of_launcher", is_flag=True, help="Of the process that watches it.")
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@output_options
def logs(
    name: str,
    job_id: str | None,
    of_launcher: bool,
    follow: bool,
    output: Output,  # noqa: ARG001 - every command takes --format and -v
) -> None:
    """Print the log of the launch NAME's newest instance, and what its job printed."""
    from fabric.cli import launches
    from fabric.errors import NotFound
    from fabric.launch.jobs import LaunchFolder

    folder = LaunchFolder.find(launches.root(), name)
    if of_launcher:
        _print(folder.log_path, follow=follow)
        return
    jobs = [job for job in folder.jobs() if job_id in (None, job.job_id)]
    if not jobs:
        raise NotFound(kind="job", name=job_id or f"of {folder.name}")
    for path in sorted(folder.scripts.glob("*.std*"))[-2:]:
        if path.stat().st_size:
            note(f"{path.name}:")
            _print(path, follow=False)
    _print(folder.instance_log(jobs[-1].instance), follow=follow)


def _print(path: Path, *, follow: bool) -> None:
    try:
        with path.open(errors="replace") as file:
            click.echo(file.read(), nl=False)
            while follow:
                click.echo(file.read(), nl=False)
                time.sleep(POLL_S)
    except FileNotFoundError:
        note("Nothing was written yet.")
