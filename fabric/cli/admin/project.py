"""``fabric-admin project``."""

from __future__ import annotations

import click

from fabric.cli.admin.database import Books, confirm, database_options, day, yes_option
from fabric.cli.admin.project_group import group
from fabric.cli.output import Output, note


@click.group()
def project() -> None:
    """Who is charged."""


project.add_command(group)


@project.command()
@click.argument("name")
@click.option("--title", default="", metavar="TEXT")
@database_options
def add(name: str, title: str, books: Books, output: Output) -> None:
    """Add a project."""
    record = books.keys.add_project(name, title=title)
    output.json(record) if output.is_json else note(f"Added the project {name}.")


@project.command()
@click.argument("name", required=False)
@database_options
def show(name: str | None, books: Books, output: Output) -> None:
    """List the projects, or show one."""
    records = [books.keys.project(name)] if name else books.keys.projects()
    if output.is_json:
        output.json(records[0] if name else records)
        return
    rows = [(p.name, p.title, day(p.created_at)) for p in records]
    output.table(["PROJECT", "TITLE", "CREATED (UTC)"], rows)


@project.command()
@click.argument("name")
@click.option("--title", required=True, metavar="TEXT")
@database_options
def modify(name: str, title: str, books: Books, output: Output) -> None:
    """Change a project's title."""
    record = books.keys.modify_project(name, title=title)
    output.json(record) if output.is_json else note(f"Changed the project {name}.")


@project.command()
@click.argument("name")
@yes_option
@database_options
def delete(name: str, yes: bool, books: Books, output: Output) -> None:
    """Forget a project and its keys; its charges stay on record."""
    record = books.keys.project(name)
    confirm(f"Delete the project {name} and its {len(books.keys.keys(name))} keys?", yes=yes)
    books.keys.delete_project(name)
    output.json(record) if output.is_json else note(f"Deleted the project {name}.")
