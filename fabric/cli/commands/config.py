"""``fabric config``: settings and where they come from."""

from __future__ import annotations

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output


@click.group()
def config() -> None:
    """Show settings and where they come from."""


@config.command()
@output_options
def show(output: Output) -> None:
    """List every setting, its value (secrets masked) and the layer that set it."""
    from fabric.config import load_settings

    origins = load_settings().origins
    if output.is_json:
        output.json({name: {"value": o.value, "source": o.source} for name, o in origins.items()})
        return
    rows = [(name, origin.value, origin.source) for name, origin in origins.items()]
    output.table(["SETTING", "VALUE", "FROM"], rows)


@config.command()
@output_options
def path(output: Output) -> None:
    """Print where your own settings are read from."""
    from fabric.config import user_config_path

    file = user_config_path()
    if output.is_json:
        output.json({"path": str(file), "exists": file.is_file()})
    else:
        click.echo(file)
