"""The manner of every command that changes something: tried, told, and undone for a dry run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fabric.cli.admin.database import DRY_RUN, confirm, open_books
from fabric.cli.options import Command, output_options
from fabric.cli.output import Output, note, shown, to_json
from fabric.errors import Duplicate, RequestInvalid

if TYPE_CHECKING:
    from fabric.sql import Database

Record = TypeVar("Record")

UNCHANGED = "Nothing was changed: this was a dry run."


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How a command changes something and tells of it.

    In a dry run everything is done, with all its checks and refusals, and then undone.
    """

    output: Output
    is_dry_run: bool = False

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something is lost; a dry run loses nothing."""
        confirm(question, yes=yes or self.is_dry_run)

    def add(
        self,
        what: str,
        make: Callable[[], Record],
        find: Callable[[], Record],
        given: Mapping[str, object],
    ) -> Record:
        """Add what is not there; leave alone what is there and like what was given.

        Args:
            what: Its kind and name, as in ``project astro``.
            make: Adds and returns it.
            find: Returns the one that is there.
            given: Fields and their values; ``None`` stands for any.

        Raises:
            Duplicate: There is one that differs.
        """
        try:
            record = make()
        except Duplicate:
            record = find()
            if any(v is not None and v != getattr(record, name) for name, v in given.items()):
                raise
            self.tell("added", what, record, before=record)
        else:
            self.tell("added", what, record)
        return record

    def tell(self, done: str, what: str, record: object, *, before: object = None) -> None:
        """Print what was done, or what would be.

        Args:
            done: A participle, as in ``added``.
            what: What it was done to, as in ``project astro``.
            record: What is there now, or was until now.
            before: What was there before, of something that was changed.
        """
        changes = differences(before, record)
        if self.output.is_json:
            told = {"dry_run": True, "done": done, "changes": changes, "record": record}
            self.output.json(told if self.is_dry_run else record)
            return
        if before is not None and not changes:
            note(f"The {what} is like that already; nothing was changed.")
            return
        note(f"The {what} {'would be' if self.is_dry_run else 'was'} {done}.")
        for field, each in changes.items():
            note(f"  {field}: {shown(each['from']) or 'none'} -> {shown(each['to']) or 'none'}")
        if self.is_dry_run:
            note(UNCHANGED)


def differences(before: object, after: object) -> dict[str, dict[str, Any]]:
    """Return the fields of a record that changed, with what they were and what they are."""
    if before is None:
        return {}
    old, new = to_json(before), to_json(after)
    return {
        name: {"from": old[name], "to": value} for name, value in new.items() if old[name] != value
    }


def change_options(function: Command) -> Command:
    """Add ``--database`` and ``--dry-run``; the function gets ``books`` and ``change``."""

    @output_options
    @click.option("--database", "database_url", metavar="URL", help="The hub's database.")
    @click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, database_url: str | None, dry_run: bool, output: Output, **kwargs: Any
    ) -> Any:
        change = Change(output=output, is_dry_run=dry_run)
        with open_books(database_url, around=undone if dry_run else None) as books:
            return function(*args, books=books, change=change, **kwargs)

    return wrapper  # type: ignore[return-value]


def undoable_options(function: Command) -> Command:
    """Add what ``database_options`` does and ``--dry-run``; the function gets ``books`` and
    ``output``, and tells what it did in its own words."""

    @output_options
    @click.option("--database", "database_url", metavar="URL", help="The hub's database.")
    @click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
    @functools.wraps(function)
    def wrapper(*args: Any, database_url: str | None, dry_run: bool, **kwargs: Any) -> None:
        if dry_run:
            click.get_current_context().meta[DRY_RUN] = True
        with open_books(database_url, around=undone if dry_run else None) as books:
            function(*args, books=books, **kwargs)
        if dry_run:
            note(UNCHANGED)

    return wrapper  # type: ignore[return-value]


def require_some(kind: str, name: str, given: Mapping[str, object]) -> None:
    """Refuse a change that changes nothing.

    Args:
        kind: Of what, as in ``project``.
        name: Which.
        given: The values of the options that say what to change, by option.

    Raises:
        RequestInvalid: None of them was given.
    """
    if all(value is None or value is False or value == () for value in given.values()):
        reason = f"nothing to change was given; say at least one of {', '.join(given)}"
        raise RequestInvalid(param=kind, value=name, reason=reason)


class _Undone(Exception):
    """Takes a transaction back."""


@contextmanager
def undone(database: Database) -> Iterator[None]:
    """Take back in the end all that is done to the database inside, its schema included."""
    try:
        with database.transaction():
            yield
            raise _Undone
    except _Undone:
        pass
