"""``fabric adapter``: a project's own LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.sdk import Fabric


@click.group()
def adapter() -> None:
    """Keep LoRA adapters at the hub, for your project alone."""


@adapter.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="What to call it; the directory's name by default.")
@click.option("--model", metavar="NAME[@REVISION]", help="The model that it was trained on.")
@client_options
def add(
    directory: Path, name: str | None, model: str | None, fabric: Fabric, output: Output
) -> None:
    """Upload the adapter that PEFT saved to DIRECTORY."""
    added = fabric.add_adapter(directory, name=name, model=model)
    if output.is_json:
        output.json(added)
    else:
        note(f"`fabric query --adapter {added.name} …` asks with it.")
        click.echo(added.name)


@adapter.command("list")
@client_options
def list_(fabric: Fabric, output: Output) -> None:
    """List your project's adapters."""
    adapters = fabric.adapters()
    if output.is_json:
        output.json(adapters)
        return
    output.table(
        [
            *(Column("ADAPTER", whole=True), "MODEL", Column("RANK", numeric=True)),
            *(Column("LAYERS", numeric=True), Column("BYTES", numeric=True), "DIGEST"),
        ],
        [
            (one.name, one.model, one.rank, one.num_layers, one.num_bytes, one.digest[:19])
            for one in adapters
        ],
        empty="There are none; `fabric adapter add DIRECTORY` uploads one.",
    )


@adapter.command()
@click.argument("name")
@client_options
def delete(name: str, fabric: Fabric, output: Output) -> None:  # noqa: ARG001
    """Delete the adapter NAME; what runs with it runs to its end."""
    fabric.delete_adapter(name)
    note(f"The adapter {name} is deleted.")
