"""``fabric extend``: keep a launch going."""

from __future__ import annotations

from datetime import datetime

import click

from fabric.cli.commands.launch import Until
from fabric.cli.options import output_options
from fabric.cli.output import Output, note


@click.command()
@click.argument("name")
@click.option("--until", "until", type=Until(), required=True, help="8h from now, or a time.")
@output_options
def extend(name: str, until: datetime, output: Output) -> None:
    """Let jobs of the launch NAME follow one another until a later time.

    A job's own walltime stays as it is: schedulers let administrators alone lengthen it. A
    successor is submitted early enough to be ready before the job ends.
    """
    from fabric.cli import launches
    from fabric.errors import LaunchImpossible
    from fabric.launch.jobs import LaunchFolder

    folder = LaunchFolder.find(launches.root(), name)
    record = folder.launch()
    assert record is not None
    if record.ended_at is not None or record.stop:
        reason = "it is over, or is being ended; launch again"
        raise LaunchImpossible(param="launch", value=folder.name, reason=reason)
    order = record.order.model_copy(update={"keep_until": until})
    folder.write_launch(record.model_copy(update={"order": order}))
    if output.is_json:
        output.json(launches.describe(folder))
        return
    note(f"{folder.name} is kept until {until:%Y-%m-%d %H:%M UTC}.")
