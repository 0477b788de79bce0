"""``fabric-admin user``."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import UTC_TIME, Books, database_options, day, yes_option
from fabric.cli.admin.key import scope_option
from fabric.cli.admin.project_group import SCOPES
from fabric.cli.money import su
from fabric.cli.output import Column, Output, to_json

if TYPE_CHECKING:
    from fabric.auth import BlockedUser

_user = click.argument("name", metavar="USER")
_at_once = click.option("--max-concurrent", type=click.IntRange(min=1), help="Requests at once.")


@click.group()
def user() -> None:
    """Who asks: people who log in with Globus, and keys.

    People come and go as members of the Globus groups of a project (`fabric-admin
    project group`). Here they are let in and kept out one by one. USER is
    NAME@DOMAIN, or the UUID of an identity. Keys have `fabric-admin key`.

    \b
    Example:
      fabric-admin user show --project astro
    """


@user.command()
@click.argument("project")
@_user
@scope_option(
    SCOPES,
    f"What they may do: {', '.join(SCOPES)}. Repeatable; query by default.",
    default=["query"],
)
@_at_once
@change_options
def add(
    project: str,
    name: str,
    scopes: tuple[str, ...],
    max_concurrent: int | None,
    books: Books,
    change: Change,
) -> None:
    """Let USER act for PROJECT, in whatever groups they are.

    \b
    Example:
      fabric-admin user add astro alice@example.edu
    """
    limit = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
    change.add(
        f"user {name} of {project}",
        lambda: books.users.add(name, project, scopes=scopes, **limit),
        lambda: books.users.user(name, project),
        {"scopes": frozenset(scopes), **limit},
    )


@user.command()
@click.option("--project", metavar="NAME", help="Only those of this project.")
@click.option("--since", type=UTC_TIME, help="Only what was asked since then (UTC).")
@click.option("--added", is_flag=True, help="Those who were added one by one, instead.")
@click.option("--blocked", is_flag=True, help="Those who are kept out, instead.")
@database_options
def show(
    project: str | None,
    since: datetime | None,
    added: bool,
    blocked: bool,
    books: Books,
    output: Output,
) -> None:
    """List who has asked, how much, and when last; the latest first.

    \b
    Examples:
      fabric-admin user show --since 2030-01-01 --format json
      fabric-admin user show --blocked
    """
    if added and blocked:
        raise click.UsageError("Choose one of --added and --blocked.")
    if since is not None and (added or blocked):
        raise click.UsageError("--since is of what was asked: not with --added or --blocked.")
    if project is not None and blocked:
        raise click.UsageError("Who is kept out is so of every project: not with --project.")
    if project is not None:
        books.keys.project(project)
    if added:
        _show_added(project, books, output)
    elif blocked:
        _show_blocked(books, output)
    else:
        _show_asked(project, since, books, output)


@user.command()
@click.argument("project")
@_user
@scope_option(SCOPES, "Replaces the old ones; repeatable.")
@_at_once
@change_options
def modify(
    project: str,
    name: str,
    scopes: tuple[str, ...],
    max_concurrent: int | None,
    books: Books,
    change: Change,
) -> None:
    """Change what USER was added to PROJECT for.

    \b
    Example:
      fabric-admin user modify astro alice@example.edu --max-concurrent 8
    """
    require_some("user", name, {"--scope": scopes, "--max-concurrent": max_concurrent})
    before = books.users.user(name, project)
    after = books.users.modify(name, project, scopes=scopes or None, max_concurrent=max_concurrent)
    change.tell("changed", f"user {name} of {project}", after, before=before)


@user.command()
@click.argument("project")
@_user
@yes_option
@change_options
def delete(project: str, name: str, yes: bool, books: Books, change: Change) -> None:
    """End what USER was added to PROJECT for; what groups say stays.

    \b
    Example:
      fabric-admin user delete astro alice@example.edu --yes
    """
    change.confirm(f"Take the project {project} from {name}?", yes=yes)
    record = books.users.delete(name, project)
    change.tell("deleted", f"user {name} of {project}", record)


@user.command()
@_user
@click.option("--reason", default="", metavar="TEXT", help="What the person is told.")
@yes_option
@change_options
def block(name: str, reason: str, yes: bool, books: Books, change: Change) -> None:
    """Keep USER out of the hub within a second, whatever groups say.

    Their tickets are void and their batches end; what is in flight goes on. End instances of
    theirs with `fabric-admin replica delete`.

    \b
    Example:
      fabric-admin user block alice@example.edu --reason "a stolen laptop" -y
    """
    change.confirm(f"Keep {name} out of the hub?", yes=yes)
    change.add(
        f"block of {name}",
        lambda: books.users.block(name, reason=reason),
        lambda: _find_block(books, name),
        {"reason": reason or None},
    )


@user.command()
@_user
@yes_option
@change_options
def unblock(name: str, yes: bool, books: Books, change: Change) -> None:
    """Let USER in again, as far as groups and projects say.

    \b
    Example:
      fabric-admin user unblock alice@example.edu --yes
    """
    change.confirm(f"Let {name} into the hub again?", yes=yes)
    change.tell("lifted", f"block of {name}", books.users.unblock(name))


def _show_asked(project: str | None, since: datetime | None, books: Books, output: Output) -> None:
    from fabric.auth import GLOBUS

    names = {f"{GLOBUS}{identity}": name for identity, name in books.users.names().items()}
    kept_out = {one.user for one in books.users.blocked()}
    found = []
    for one in books.catalog.users(project, since=since):
        name = names.get(one.key_id, "")
        called = {one.key_id.removeprefix(GLOBUS), name}
        found.append((one, name, not kept_out.isdisjoint(called)))
    if output.is_json:
        output.json([{**to_json(u), "name": name, "blocked": out} for u, name, out in found])
        return
    output.table(
        [
            *("USER", "PROJECT", Column("RUNS", numeric=True), Column("SU", numeric=True)),
            *("LAST (UTC)", ""),
        ],
        [
            (
                *(name or u.key_id, u.project, u.num_runs, su(u.charge_usu)),
                *(f"{u.last_at:%Y-%m-%d}", "blocked" if out else ""),
            )
            for u, name, out in found
        ],
    )


def _show_added(project: str | None, books: Books, output: Output) -> None:
    records = books.users.users(project)
    if output.is_json:
        output.json(records)
        return
    output.table(
        ["PROJECT", "USER", "SCOPES", Column("AT ONCE", numeric=True)],
        [(u.project, u.user, " ".join(sorted(u.scopes)), u.max_concurrent) for u in records],
    )


def _show_blocked(books: Books, output: Output) -> None:
    records = books.users.blocked()
    if output.is_json:
        output.json(records)
        return
    rows = [(one.user, day(one.created_at), one.reason) for one in records]
    output.table(["USER", "SINCE (UTC)", "REASON"], rows, empty="Nobody is kept out.")


def _find_block(books: Books, name: str) -> BlockedUser:
    from fabric.auth import parse_user

    return next(one for one in books.users.blocked() if one.user == parse_user(name))
