"""``fabric instances``: the user's own launches."""

from __future__ import annotations

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note


@click.command()
@click.argument("name", required=False)
@click.option("--all", "also_over", is_flag=True, help="Those that are over, too.")
@click.option("--watch", "is_watching", is_flag=True, help="Watch launches again that nobody does.")
@output_options
def instances(name: str | None, also_over: bool, is_watching: bool, output: Output) -> None:
    """List your launches with their jobs, or one by NAME.

    A launch is watched by a process where it was made. If that was killed, its jobs go on until
    their walltime, but nothing follows them: --watch starts it again, and it finds its jobs.
    """
    from fabric.cli import launches, launching
    from fabric.launch.jobs import LaunchFolder

    root = launches.root()
    folders = [LaunchFolder.find(root, name)] if name else LaunchFolder.all(root)
    shown, unwatched = [], []
    for folder in folders:
        record = folder.launch()
        if record is None:
            continue
        if not launches.is_settled(folder) and not folder.is_watched():
            unwatched.append(folder)
        if record.ended_at is None or also_over or name:
            shown.append(folder)
    if is_watching:
        for folder in unwatched:
            with folder.watched() as lock:
                if lock is not None:
                    launching.start(folder, lock)
            note(f"{folder.name} is watched again.")
    if output.is_json:
        output.json([launches.describe(folder) for folder in shown])
        return
    output.table(
        launches.COLUMNS,
        [
            row
            for folder in shown
            for row in launches.rows(
                folder, [job for job in folder.jobs() if job.open or also_over or name]
            )
        ],
        empty="You have no launches; `fabric launch --help` shows how to make one.",
    )
    for folder in unwatched if not is_watching else ():
        note(f"Nobody watches {folder.name}; `fabric instances --watch` does again.")
