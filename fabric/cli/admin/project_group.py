"""``fabric-admin project group``: Globus groups whose members act for a project."""

from __future__ import annotations

import click

from fabric.cli.admin.database import Books, confirm, database_options, day, yes_option
from fabric.cli.admin.key import PROGRAM_SCOPES
from fabric.cli.output import Column, Output, note


@click.group()
def group() -> None:
    """Globus groups whose members act for a project."""


@group.command()
@click.argument("project")
@click.argument("group_id", metavar="UUID")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["query", "admin", "launch", *PROGRAM_SCOPES]),
    multiple=True,
    default=["query"],
    show_default=True,
)
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once, each member.")
@database_options
def add(
    project: str,
    group_id: str,
    scopes: tuple[str, ...],
    max_concurrent: int | None,
    books: Books,
    output: Output,
) -> None:
    """Let the members of the Globus group UUID act for PROJECT."""
    limit = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
    record = books.groups.add(group_id, project, scopes=scopes, **limit)
    output.json(record) if output.is_json else note(f"Added the group {group_id} to {project}.")


@group.command()
@click.argument("project", required=False)
@database_options
def show(project: str | None, books: Books, output: Output) -> None:
    """List the groups of all projects, or of one."""
    if project is not None:
        books.keys.project(project)
    records = books.groups.groups(project)
    if output.is_json:
        output.json(records)
        return
    output.table(
        ["PROJECT", "GROUP", "SCOPES", Column("AT ONCE", numeric=True), "CREATED (UTC)"],
        [
            (
                *(one.project, one.group_id, " ".join(sorted(one.scopes))),
                *(one.max_concurrent, day(one.created_at)),
            )
            for one in records
        ],
    )


@group.command()
@click.argument("project")
@click.argument("group_id", metavar="UUID")
@yes_option
@database_options
def delete(project: str, group_id: str, yes: bool, books: Books, output: Output) -> None:
    """End what the group's members may do in PROJECT; running hubs notice within a second."""
    confirm(f"Take the project {project} from the members of {group_id}?", yes=yes)
    record = books.groups.delete(group_id, project)
    output.json(record) if output.is_json else note(f"Removed the group {group_id} of {project}.")
