"""``fabric-admin site``."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Literal

import click

from fabric.cli.admin.database import Books, confirm, database_options, yes_option
from fabric.cli.admin.site_files import list_shipped, validate
from fabric.cli.options import output_options
from fabric.cli.output import Output, note


@click.group()
def site() -> None:
    """Places where models run."""


site.add_command(validate)
site.add_command(list_shipped)


@site.command()
@click.argument("name", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="A site file, instead of NAME.")
@click.option("--display", metavar="TEXT", help="What people read; the name by default.")
@database_options
def add(
    name: str | None,
    file: Path | None,
    display: str | None,
    books: Books,
    output: Output,
) -> None:
    """Add a site, by NAME or from its file."""
    from fabric.config import load_site

    if (name is None) == (file is None):
        raise click.UsageError("Give either NAME or --file.")
    if file is not None:
        spec = load_site(file)
        facts = spec.model_dump(mode="json")
        record = books.catalog.add_site(spec.name, display=display or spec.title, facts=facts)
    else:
        record = books.catalog.add_site(str(name), display=display or "")
    output.json(record) if output.is_json else note(f"Added the site {record.name}.")


@site.command()
@click.argument("name", required=False)
@database_options
def show(name: str | None, books: Books, output: Output) -> None:
    """List the sites, or show one."""
    records = [books.catalog.get_site(name)] if name else books.catalog.sites()
    if output.is_json:
        output.json(records[0] if name else records)
        return
    rows = [(s.name, s.state, s.display) for s in records]
    output.table(["SITE", "STATE", "DISPLAY"], rows)


@site.command()
@click.argument("name")
@click.option("--display", metavar="TEXT")
@click.option("--state", type=click.Choice(["enabled", "disabled"]))
@click.option(
    "--max-in-flight",
    type=click.IntRange(0, 10**6),
    metavar="N",
    help="Requests it works on at once; 0 is any number.",
)
@database_options
def modify(
    name: str,
    display: str | None,
    state: Literal["enabled", "disabled"] | None,
    max_in_flight: int | None,
    books: Books,
    output: Output,
) -> None:
    """Change a site; a disabled one gets no new requests."""
    if max_in_flight is not None:
        books.catalog.set_max_in_flight(name, max_in_flight or None)
    record = books.catalog.modify_site(name, display=display, state=state)
    output.json(record) if output.is_json else note(f"Changed the site {name}.")


@site.command()
@click.argument("name")
@yes_option
@database_options
def delete(name: str, yes: bool, books: Books, output: Output) -> None:
    """Forget a site; its instances can no longer join."""
    record = books.catalog.get_site(name)
    confirm(f"Delete the site {name} and its launches?", yes=yes)
    books.catalog.delete_site(name)
    output.json(record) if output.is_json else note(f"Deleted the site {name}.")


@site.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--hub", "hub_url", metavar="URL", help="The hub's address (default: yours).")
@click.option(
    "--token-file",
    type=click.File(),
    required=True,
    help="Holds the site's key, which `fabric-admin key add --scope site --site NAME` makes.",
)
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where the site keeps files.")
@output_options
def run(
    file: Path,
    hub_url: str | None,
    token_file: IO[str],
    state_dir: Path | None,
    output: Output,  # noqa: ARG001 - every command takes --format and -v
) -> None:
    """Run a site's agent in the foreground: it keeps the models of the site FILE up.

    SIGTERM and Ctrl-C drain its instances and end its block.
    """
    import asyncio

    from fabric.config import StateDir, load_settings, load_site
    from fabric.launch.agent import AgentSpec, SiteAgent

    settings = load_settings({"state_dir": state_dir, "client.base_url": hub_url})
    spec = load_site(file)
    folder = StateDir(settings.state_dir)
    folder.create()
    agent = SiteAgent(
        AgentSpec(
            site=spec,
            hub_url=settings.client.base_url,
            token=token_file.read().strip(),
            state_dir=folder.site_dir(spec.name),
        )
    )
    asyncio.run(agent.run())
