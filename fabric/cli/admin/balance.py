"""``fabric-admin alloc balance``: what the centre itself says is left."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output


@click.command()
@click.argument("site")
@click.option("--project", required=True, metavar="NAME", help="What jobs there are charged to.")
@click.option("--token-file", type=click.File(), help="Holds a token of the facility's API.")
@output_options
def balance(site: str, project: str, token_file: IO[str] | None, output: Output) -> None:
    """Ask the centre of SITE (a name, or a site's file) what a project has left there.

    Commands of a centre are there on its login nodes only.

    \b
    Example:
      fabric-admin alloc balance alcf-polaris --project astro
    """
    import asyncio

    from fabric.config import find_site, load_site
    from fabric.launch.balances import get_balance_source

    path = Path(site)
    spec = load_site(path if path.exists() else find_site(site))
    source = get_balance_source(spec, token_file.read().strip() if token_file else None)
    found = asyncio.run(source.balance(project))
    if output.is_json:
        output.json({"site": spec.name, "project": project, "balance": found})
        return
    known = [("granted", found.granted), ("used", found.used), ("available", found.available)]
    output.facts(
        [
            ("site", spec.title or spec.name),
            ("project", project),
            *((name, f"{each:,f} {found.unit}") for name, each in known if each is not None),
            ("as of (UTC)", f"{found.as_of:%Y-%m-%d %H:%M}"),
        ]
    )
