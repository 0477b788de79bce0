"""``fabric-admin function``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from fabric.cli.admin.change import Change, change_options
from fabric.cli.admin.database import Books, database_options, day, yes_option
from fabric.cli.lazy import AliasedGroup
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.catalog import FunctionRecord, Visibility
    from fabric.compute.functions import FunctionSource


@click.group(cls=AliasedGroup, aliases={"register": "add", "list": "show", "retire": "delete"})
def function() -> None:
    """Functions registered with Globus Compute.

    \b
    Example:
      fabric-admin function add --dry-run
    """


@function.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--public", is_flag=True, help="Anybody may call them.")
@click.option("--group", type=click.UUID, help="The Globus group whose members may call them.")
@click.option("--endpoint", type=click.UUID, help="The only endpoint they may run at.")
@click.option("--force", is_flag=True, help="Also what is registered and has not changed.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@database_options
def add(
    names: tuple[str, ...],
    public: bool,
    group: UUID | None,
    endpoint: UUID | None,
    force: bool,
    dry_run: bool,
    books: Books,
    output: Output,
) -> None:
    """Register functions of this release, all of them by default, and record their ids.

    What is registered in the same way from the same source keeps its id. Without --public, --group
    and --endpoint they are for this login alone. `register` is the same.

    \b
    Example:
      fabric-admin function add infer --group 6c91e6eb-085c-11e6-a7a5-22000bf2d559
    """
    from fabric import __version__
    from fabric.compute.functions import register, shipped_function, shipped_functions

    if public + (group is not None) + (endpoint is not None) > 1:
        raise click.UsageError("Give at most one of --public, --group and --endpoint.")
    visibility: Visibility = "public" if public else "group" if group else "private"
    scope: dict[str, Any] = {
        "visibility": visibility,
        "group_id": group and str(group),
        "endpoint_id": endpoint and str(endpoint),
    }
    sources = [shipped_function(name) for name in names or shipped_functions()]
    known = {} if force else {source.name: _find(books, source, scope) for source in sources}
    new = [source for source in sources if known.get(source.name) is None]
    if dry_run:
        _print_plan(sources, known, output)
        return
    client = _get_client() if new else None
    records = []
    for source in sources:
        record = known.get(source.name)
        if record is None:
            assert client is not None
            id = register(client, source, public=public, group=group, endpoint_id=endpoint)
            record = books.catalog.add_function(
                str(id), source.name, sha256=source.sha256, fabric_version=__version__, **scope
            )
        records.append(record)
    _print(records, output)
    note(f"Registered {len(new)}; {len(sources) - len(new)} had not changed.")


@function.command()
@click.argument("function_ref", metavar="[NAME|ID]", required=False)
@click.option("--all", "with_retired", is_flag=True, help="Also those that are retired.")
@database_options
def show(function_ref: str | None, with_retired: bool, books: Books, output: Output) -> None:
    """List the registered functions, or show one as the service has it.

    The list names those whose source this release has changed. One that is shown is compared with
    what this release ships; the command ends with code 3 if they differ.

    \b
    Example:
      fabric-admin function show infer
    """
    if function_ref is None:
        _list(with_retired, books, output)
    else:
        _show(function_ref, books, output)


def _list(with_retired: bool, books: Books, output: Output) -> None:
    from fabric.compute.functions import check_source, shipped_function
    from fabric.errors import FunctionDrifted

    records = books.catalog.functions(retired=with_retired)
    _print(records, output)
    for record in records:
        if _state(record) == "drifted":
            try:
                check_source(shipped_function(record.name), record.id, record.sha256)
            except FunctionDrifted as drifted:
                note(drifted.message)


def _show(function_ref: str, books: Books, output: Output) -> None:
    from fabric.compute.functions import check_source, fetch_source, shipped_functions

    record = _resolve(books, function_ref)
    registered = fetch_source(_get_client(), UUID(record.id))
    if output.is_json:
        output.json({**_to_json(record), "source": registered.source})
    else:
        output.facts(
            [
                ("name", record.name),
                ("id", record.id),
                ("state", _state(record)),
                ("callers", _callers(record)),
                ("endpoint", record.endpoint_id or "any"),
                ("release", record.fabric_version),
                ("registered", day(record.created_at)),
                ("sha256", registered.sha256),
            ]
        )
        click.echo(f"\n{registered.source.strip()}")
    shipped = shipped_functions().get(record.name)
    if shipped is not None:
        check_source(shipped, record.id, registered.sha256)


@function.command()
@click.argument("function_ref", metavar="NAME|ID")
@yes_option
@change_options
def delete(function_ref: str, yes: bool, books: Books, change: Change) -> None:
    """Delete a function at the service: calls of its id fail from now on.

    Its record stays, as retired; `retire` is the same.

    \b
    Example:
      fabric-admin function delete infer --dry-run
    """
    from fabric.compute.functions import retire

    before = _resolve(books, function_ref)
    change.confirm(f"Retire the function {before.name} ({before.id})?", yes=yes)
    if not change.is_dry_run:
        retire(_get_client(), UUID(before.id))
    after = books.catalog.retire_function(before.id)
    if change.output.is_json and not change.is_dry_run:
        change.output.json(_to_json(after))
    else:
        change.tell("retired", f"function {after.name}", after, before=before)


def _get_client() -> Any:
    from fabric.compute.client import get_client

    return get_client()


def _find(books: Books, source: FunctionSource, scope: dict[str, Any]) -> FunctionRecord | None:
    """Return the record of a source that is registered in this way."""
    for record in books.catalog.functions(source.name):
        same = all(getattr(record, name) == value for name, value in scope.items())
        if same and record.sha256 == source.sha256:
            return record
    return None


def _resolve(books: Books, ref: str) -> FunctionRecord:
    """Return the function of an id, or the only one of a name.

    Raises:
        NotFound: There is none.
        RequestInvalid: The name has several.
    """
    from fabric.errors import RequestInvalid

    named = books.catalog.functions(ref)
    if len(named) > 1:
        reason = f"it is registered several times, say which: {[one.id for one in named]}"
        raise RequestInvalid(param="function", value=ref, reason=reason)
    return named[0] if named else books.catalog.function(ref)


def _state(record: FunctionRecord) -> str:
    from fabric.compute.functions import shipped_functions

    shipped = shipped_functions().get(record.name)
    if record.retired_at is not None:
        return "retired"
    if shipped is None:
        return "not shipped"
    return "current" if shipped.sha256 == record.sha256 else "drifted"


def _callers(record: FunctionRecord) -> str:
    return f"group {record.group_id}" if record.group_id else record.visibility


def _to_json(record: FunctionRecord) -> dict[str, Any]:
    return {**asdict(record), "state": _state(record)}


def _print(records: list[FunctionRecord], output: Output) -> None:
    if output.is_json:
        output.json([_to_json(record) for record in records])
        return
    output.table(
        ["FUNCTION", Column("ID", whole=True), "CALLERS", "STATE"],
        [(r.name, r.id, r.visibility, _state(r)) for r in records],
        empty="None is registered; `fabric-admin function add` does it.",
    )


def _print_plan(
    sources: list[FunctionSource], known: dict[str, FunctionRecord | None], output: Output
) -> None:
    plan = [
        {"name": source.name, "sha256": source.sha256, "id": found.id if found else None}
        for source in sources
        for found in [known.get(source.name)]
    ]
    if output.is_json:
        output.json(plan)
        return
    rows = [(p["name"], str(p["sha256"])[:12], p["id"] or "to be registered") for p in plan]
    output.table(["FUNCTION", "SHA256", "ID"], rows)
