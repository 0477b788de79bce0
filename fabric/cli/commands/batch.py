"""``fabric batch``: many requests in one file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.sdk import Batch, Fabric

POLL_S = 0.5


@click.group()
def batch() -> None:
    """Have many requests answered from one file, when there is room."""


@batch.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--wait", "is_waiting", is_flag=True, help="Return when the batch is over.")
@client_options
def submit(file: Path, is_waiting: bool, fabric: Fabric, output: Output) -> None:
    """Begin the batch of FILE and print its id.

    FILE has one request a line: {"custom_id": …, "method": "POST", "url": …, "body": …}.
    """
    begun = fabric.batch(file)
    if is_waiting:
        note(f"The batch {begun.id} has begun.")
        _print(_wait(fabric, begun.id), output)
    elif output.is_json:
        output.json(begun)
    else:
        note(f"`fabric batch status {begun.id} --wait` watches it.")
        click.echo(begun.id)


@batch.command()
@click.argument("batch_id", metavar="BATCH")
@click.option("--wait", "is_waiting", is_flag=True, help="Return when the batch is over.")
@client_options
def status(batch_id: str, is_waiting: bool, fabric: Fabric, output: Output) -> None:
    """Show how far BATCH is."""
    _print(_wait(fabric, batch_id) if is_waiting else fabric.get_batch(batch_id), output)


@batch.command()
@click.argument("batch_id", metavar="BATCH")
@client_options
def results(batch_id: str, fabric: Fabric, output: Output) -> None:  # noqa: ARG001
    """Print the results of BATCH, one JSON object a line: the answers, then the errors."""
    for line in fabric.batch_results(batch_id):
        click.echo(json.dumps(line, ensure_ascii=False))


@batch.command()
@click.argument("batch_id", metavar="BATCH")
@client_options
def cancel(batch_id: str, fabric: Fabric, output: Output) -> None:
    """End BATCH early; what was answered stays, the rest is not charged."""
    _print(fabric.cancel_batch(batch_id), output)


@batch.command("list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@client_options
def list_(limit: int, fabric: Fabric, output: Output) -> None:
    """List your project's batches, newest first."""
    latest = fabric.batches(limit=limit)
    if output.is_json:
        output.json(latest)
        return
    output.table(
        [
            *(Column("BATCH", whole=True), "STARTED", "STATE"),
            *(Column("DONE", numeric=True), Column("FAILED", numeric=True)),
            *(Column("OF", numeric=True), Column("SU", numeric=True)),
        ],
        [
            (
                one.id,
                datetime.fromtimestamp(one.created_at, UTC).strftime("%m-%d %H:%M"),
                one.status,
                one.num_completed,
                one.num_failed,
                one.num_lines,
                su(one.charge_usu),
            )
            for one in latest
        ],
        empty="There are none; `fabric batch submit FILE` begins one.",
    )


def _print(one: Batch, output: Output) -> None:
    if output.is_json:
        output.json(one)
        return
    output.facts(
        [
            ("batch", one.id),
            ("state", one.status),
            ("model", one.model or ""),
            ("answered", f"{one.num_completed} of {one.num_lines}, {one.num_failed} failed"),
            ("charge", f"{su(one.charge_usu)} SU"),
            *((_place(error), error["message"]) for error in one.errors),
        ]
    )


def _place(error: Mapping[str, object]) -> str:
    return f"line {error['line']}" if error.get("line") else "error"


def _wait(fabric: Fabric, batch_id: str) -> Batch:
    """Return a batch once it is over, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("batch", total=None)

        def show(one: Batch) -> None:
            num_done = one.num_completed + one.num_failed
            total = one.num_lines or None
            progress.update(bar, description=one.status, total=total, completed=num_done)

        return _poll(fabric, batch_id, show if progress.console.is_terminal else lambda _: None)


def _poll(fabric: Fabric, batch_id: str, show: Callable[[Batch], None]) -> Batch:
    while not (one := fabric.get_batch(batch_id)).is_over:
        show(one)
        time.sleep(POLL_S)
    return one
