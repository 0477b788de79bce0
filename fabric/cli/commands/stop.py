"""``fabric stop``: end launches."""

from __future__ import annotations

import time

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note


@click.command()
@click.argument("name")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0),
    default=180,
    show_default=True,
    help="Seconds to wait until its jobs have ended; 0 does not wait.",
)
@output_options
def stop(name: str, timeout_s: float, output: Output) -> None:
    """End the launch NAME: its instances finish what they have, then its jobs end."""
    from fabric.cli import launches, launching
    from fabric.launch.jobs import LaunchFolder

    folder = LaunchFolder.find(launches.root(), name)
    record = folder.launch()
    assert record is not None
    if record.ended_at is None:
        folder.write_launch(record.model_copy(update={"stop": True}))
        with folder.watched() as lock:
            if lock is not None:
                launching.start(folder, lock)
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        record = folder.launch()
        if record is not None and record.ended_at is not None:
            break
        time.sleep(0.2)
    if output.is_json:
        output.json(launches.describe(folder))
    elif record is not None and record.ended_at is not None:
        note(f"{folder.name} has ended: {record.detail}.")
    else:
        note(f"{folder.name} is ending; `fabric instances` shows how far it is.")
