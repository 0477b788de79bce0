"""``fabric-admin project group``: Globus groups whose members act for a project."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import click

from fabric.cli.admin.change import Change, change_options
from fabric.cli.admin.database import Books, database_options, yes_option
from fabric.cli.admin.key import PROGRAM_SCOPES, scope_option
from fabric.cli.output import Column, Output
from fabric.errors import NotFound

if TYPE_CHECKING:
    from fabric.auth import GroupRecord

SCOPES = ("query", "admin", "launch", *PROGRAM_SCOPES)


@click.group()
def group() -> None:
    """Globus groups whose members act for a project.

    \b
    Example:
      fabric-admin project group show astro
    """


@group.command()
@click.argument("project")
@click.argument("group_id", metavar="UUID")
@scope_option(
    SCOPES,
    f"What they may do: {', '.join(SCOPES)}. Repeatable; query by default.",
    default=["query"],
)
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once, each member.")
@change_options
def add(
    project: str,
    group_id: str,
    scopes: tuple[str, ...],
    max_concurrent: int | None,
    books: Books,
    change: Change,
) -> None:
    """Let the members of the Globus group UUID act for PROJECT.

    \b
    Example:
      fabric-admin project group add astro 6c91e6eb-085c-11e6-a7a5-22000bf2d559
    """
    limit = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
    change.add(
        f"group {group_id} of {project}",
        lambda: books.groups.add(group_id, project, scopes=scopes, **limit),
        lambda: _find(books, project, group_id),
        {"scopes": frozenset(scopes), **limit},
    )


@group.command()
@click.argument("project", required=False)
@database_options
def show(project: str | None, books: Books, output: Output) -> None:
    """List the groups of all projects, or of one.

    \b
    Example:
      fabric-admin project group show astro
    """
    if project is not None:
        books.keys.project(project)
    records = books.groups.groups(project)
    if output.is_json:
        output.json(records)
        return
    output.table(
        ["PROJECT", Column("GROUP", whole=True), "SCOPES", Column("AT ONCE", numeric=True)],
        [
            (one.project, one.group_id, " ".join(sorted(one.scopes)), one.max_concurrent)
            for one in records
        ],
    )


@group.command()
@click.argument("project")
@click.argument("group_id", metavar="UUID")
@yes_option
@change_options
def delete(project: str, group_id: str, yes: bool, books: Books, change: Change) -> None:
    """End what the group's members may do in PROJECT; running hubs notice within a second.

    \b
    Example:
      fabric-admin project group delete astro 6c91e6eb-085c-11e6-a7a5-22000bf2d559
    """
    change.confirm(f"Take the project {project} from the members of {group_id}?", yes=yes)
    record = books.groups.delete(group_id, project)
    change.tell("deleted", f"group {group_id} of {project}", record)


def _find(books: Books, project: str, group_id: str) -> GroupRecord:
    for record in books.groups.groups(project):
        if record.group_id == str(UUID(group_id)):
            return record
    raise NotFound(kind="group of the project", name=f"{group_id} of {project}")
