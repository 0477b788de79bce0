"""``fabric-admin site``."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Literal

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import Books, database_options, yes_option
from fabric.cli.admin.site_files import list_shipped, validate
from fabric.cli.options import output_options
from fabric.cli.output import Output
from fabric.errors import RequestInvalid


@click.group()
def site() -> None:
    """Places where models run.

    \b
    Example:
      fabric-admin site add --file anvil.yaml
    """


site.add_command(validate)
site.add_command(list_shipped)


@site.command()
@click.argument("name", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="A site file, instead of NAME.")
@click.option("--display", metavar="TEXT", help="What people read; the name by default.")
@change_options
def add(
    name: str | None,
    file: Path | None,
    display: str | None,
    books: Books,
    change: Change,
) -> None:
    """Add a site, by NAME or from its file.

    \b
    Example:
      fabric-admin site add --file anvil.yaml
    """
    if (name is None) == (file is None):
        raise click.UsageError("Give either NAME or --file.")
    facts, title = _read(file)
    name, display = str(name or facts["name"]), display or title
    change.add(
        f"site {name}",
        lambda: books.catalog.add_site(name, display=display, facts=facts),
        lambda: books.catalog.get_site(name),
        {"display": display or None, "facts": facts or None},
    )


@site.command()
@click.argument("name", required=False)
@database_options
def show(name: str | None, books: Books, output: Output) -> None:
    """List the sites, or show one with what its file said of it.

    \b
    Example:
      fabric-admin site show anvil
    """
    if name:
        output.record(books.catalog.get_site(name))
        return
    records = books.catalog.sites()
    if output.is_json:
        output.json(records)
        return
    rows = [(s.name, s.state, s.display) for s in records]
    output.table(["SITE", "STATE", "DISPLAY"], rows)


@site.command()
@click.argument("name")
@click.option("--file", type=click.Path(path_type=Path), help="Its file, which has changed.")
@click.option("--display", metavar="TEXT", help="What people read.")
@click.option("--state", type=click.Choice(["enabled", "disabled"]), help="May it be asked?")
@click.option(
    "--max-in-flight",
    type=click.IntRange(0, 10**6),
    metavar="N",
    help="Requests it works on at once; 0 is any number.",
)
@change_options
def modify(
    name: str,
    file: Path | None,
    display: str | None,
    state: Literal["enabled", "disabled"] | None,
    max_in_flight: int | None,
    books: Books,
    change: Change,
) -> None:
    """Change a site; a disabled one gets no new requests.

    \b
    Example:
      fabric-admin site modify anvil --state disabled
    """
    options = {"--file": file, "--display": display, "--state": state}
    require_some("site", name, {**options, "--max-in-flight": max_in_flight})
    before = books.catalog.get_site(name)
    facts, title = _read(file)
    if facts and facts["name"] != name:
        raise RequestInvalid(param="file", value=str(file), reason=f"it is of {facts['name']!r}")
    if max_in_flight is not None:
        books.catalog.set_max_in_flight(name, max_in_flight or None)
    after = books.catalog.modify_site(
        name, display=display or title or None, state=state, facts=facts or None
    )
    change.tell("changed", f"site {name}", after, before=before)


@site.command()
@click.argument("name")
@yes_option
@change_options
def delete(name: str, yes: bool, books: Books, change: Change) -> None:
    """Forget a site; its instances can no longer join.

    \b
    Example:
      fabric-admin site delete anvil --dry-run
    """
    record = books.catalog.get_site(name)
    num_launches = len(books.catalog.launches(site=name))
    change.confirm(f"Delete the site {name} and its {num_launches} launches?", yes=yes)
    books.catalog.delete_site(name)
    change.tell("deleted", f"site {name} (with {num_launches} launches)", record)


def _read(file: Path | None) -> tuple[dict[str, object], str]:
    """Return what a site's file says of it, and its title; nothing where there is no file."""
    if file is None:
        return {}, ""
    from fabric.config import load_site

    spec = load_site(file)
    return spec.model_dump(mode="json"), spec.title


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

    \b
    Example:
      fabric-admin site run anvil.yaml --token-file anvil.key
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
