"""``fabric logs``: what the user's own instances have written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note

if TYPE_CHECKING:
    from fabric.launch.jobs import LaunchRecord

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
    record = folder.launch()
    if record is not None and record.via == "endpoint":
        _fetch(record, jobs[-1].instance, root=folder.path.parent, follow=follow)
        return
    for path in sorted(folder.scripts.glob("*.std*"))[-2:]:
        if path.stat().st_size:
            note(f"{path.name}:")
            _print(path, follow=False)
    _print(folder.instance_log(jobs[-1].instance), follow=follow)


def _fetch(record: LaunchRecord, instance: str, *, root: Path, follow: bool) -> None:
    """Print what was written at a login node that is reached through its endpoint."""
    from fabric.launch.jobs.through import get_login

    login = get_login(record.site, record.via, root)
    shown: dict[str, str] = {}
    try:
        while True:
            for name, text in login.read_logs(record, instance).items():
                before = shown.get(name, "")
                if not before and name != f"{instance}.log":
                    note(f"{name}:")
                click.echo(text.removeprefix(before), nl=False)
                shown[name] = text
            if not follow:
                break
            time.sleep(login.fastest_poll_s)
    finally:
        login.close()
    if not shown:
        note("Nothing was written yet.")


def _print(path: Path, *, follow: bool) -> None:
    try:
        with path.open(errors="replace") as file:
            click.echo(file.read(), nl=False)
            while follow:
                click.echo(file.read(), nl=False)
                time.sleep(POLL_S)
    except FileNotFoundError:
        note("Nothing was written yet.")
