"""``fabric-admin project``."""

from __future__ import annotations

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import (
    Books,
    database_options,
    day,
    warn_of_absent,
    yes_option,
)
from fabric.cli.admin.project_group import group
from fabric.cli.output import Output

_site = click.option(
    "--site", "sites", multiple=True, help="Its data may go there alone; repeatable."
)


@click.group()
def project() -> None:
    """Who is charged: what owns keys, allocations and runs.

    \b
    Example:
      fabric-admin project add astro --title "Astronomy"
    """


project.add_command(group)


@project.command()
@click.argument("name")
@click.option("--title", default="", metavar="TEXT", help="What people read.")
@_site
@change_options
def add(name: str, title: str, sites: tuple[str, ...], books: Books, change: Change) -> None:
    """Add a project.

    \b
    Example:
      fabric-admin project add astro --title "Astronomy"
    """
    change.add(
        f"project {name}",
        lambda: books.keys.add_project(name, title=title, sites=sites),
        lambda: books.keys.project(name),
        {"title": title or None, "sites": tuple(sorted(set(sites))) or None},
    )
    _warn(books, sites)


@project.command()
@click.argument("name", required=False)
@database_options
def show(name: str | None, books: Books, output: Output) -> None:
    """List the projects, or show one.

    \b
    Example:
      fabric-admin project show astro
    """
    if name:
        output.record(books.keys.project(name))
        return
    records = books.keys.projects()
    if output.is_json:
        output.json(records)
        return
    rows = [(p.name, p.title, " ".join(p.sites) or "any", day(p.created_at)) for p in records]
    output.table(["PROJECT", "TITLE", "SITES", "CREATED (UTC)"], rows)


@project.command()
@click.argument("name")
@click.option("--title", metavar="TEXT", help="What people read.")
@_site
@click.option("--any-site", is_flag=True, help="Its requests may run anywhere again.")
@change_options
def modify(
    name: str,
    title: str | None,
    sites: tuple[str, ...],
    any_site: bool,
    books: Books,
    change: Change,
) -> None:
    """Change a project's title, or where its data may go; hubs act by it within a second.

    \b
    Examples:
      fabric-admin project modify astro --title "Astronomy and Astrophysics"
      fabric-admin project modify astro --site anvil --site delta
    """
    if sites and any_site:
        raise click.UsageError("Choose one of --site and --any-site.")
    require_some("project", name, {"--title": title, "--site": sites, "--any-site": any_site})
    before = books.keys.project(name)
    after = books.keys.modify_project(name, title=title, sites=sites if sites or any_site else None)
    change.tell("changed", f"project {name}", after, before=before)
    _warn(books, sites)


@project.command()
@click.argument("name")
@yes_option
@change_options
def delete(name: str, yes: bool, books: Books, change: Change) -> None:
    """Forget a project and its keys; its charges stay on record.

    \b
    Example:
      fabric-admin project delete astro --dry-run
    """
    record = books.keys.project(name)
    num_keys = len(books.keys.keys(name))
    change.confirm(f"Delete the project {name} and its {num_keys} keys?", yes=yes)
    books.keys.delete_project(name)
    change.tell("deleted", f"project {name} (with {num_keys} keys)", record)


def _warn(books: Books, sites: tuple[str, ...]) -> None:
    for site in sites:
        warn_of_absent(books, site=site)
