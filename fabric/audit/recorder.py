"""Notes every row that a block changes, and writes it into the log with the block's own commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Delete,
    Insert,
    RowMapping,
    Table,
    Update,
    and_,
    event,
    or_,
    select,
)
from sqlalchemy.exc import InvalidRequestError

from fabric.audit.log import append
from fabric.sql import Database, metadata, utc_now

_SILENT = frozenset({"audit", "access_version"})
_SECRET = re.compile(r"(secret|token)_")


@contextmanager
def recording(
    database: Database, *, who: str, what: str, clock: Callable[[], datetime] = utc_now
) -> Iterator[None]:
    """Write an entry for each transaction in the block that changes rows; with it, or not at all.

    Args:
        database: An open, migrated database, which nobody else uses meanwhile.
        who: Who acts.
        what: What they are doing, such as ``grant add``.
        clock: The wall clock.
    """
    recorder = _Recorder(who, what, clock)
    handlers: dict[str, Callable[..., object]] = {
        "before_execute": recorder.before_execute,
        "after_execute": recorder.after_execute,
        "savepoint": recorder.on_savepoint,
        "release_savepoint": recorder.on_savepoint_kept,
        "rollback_savepoint": recorder.on_savepoint_undone,
        "rollback": recorder.on_undone,
        "commit": recorder.on_commit,
    }
    with ExitStack() as stack:
        for name, handler in handlers.items():
            event.listen(database.engine, name, handler)
            stack.callback(event.remove, database.engine, name, handler)
        yield


class _Recorder:
    def __init__(self, who: str, what: str, clock: Callable[[], datetime]) -> None:
        self._who = who
        self._what = what
        self._clock = clock
        self._before: list[dict[str, object]] = []
        self._after: list[dict[str, object]] = []
        self._marks: list[tuple[int, int]] = []
        """How much was noted when each open savepoint was set."""
        self._updated: list[ColumnElement[bool]] = []

    # ---- statements ------------------------------------------------------------------------------

    def before_execute(
        self,
        connection: Connection,
        statement: object,
        many: Sequence[Mapping[str, Any]],
        one: Mapping[str, Any],
        _options: Mapping[str, Any],
    ) -> None:
        if not isinstance(statement, Update | Delete) or not _is_told(statement.table):
            return
        table = statement.table
        assert isinstance(table, Table)
        query = select(table)
        if (where := statement.whereclause) is not None:
            query = query.where(where)
        rows = [row for given in many or [one] for row in _select(connection, query, given)]
        self._before += (_told(table, row) for row in rows)
        if isinstance(statement, Delete):
            self._before += _dependents(connection, table, rows)
        self._updated = [_is(table, row) for row in rows]

    def after_execute(
        self,
        connection: Connection,
        statement: object,
        many: Sequence[Mapping[str, Any]],
        one: Mapping[str, Any],
        _options: Mapping[str, Any],
        result: CursorResult[Any],
    ) -> None:
        if not isinstance(statement, Insert | Update) or not _is_told(statement.table):
            return
        table = statement.table
        assert isinstance(table, Table)
        if isinstance(statement, Update):
            which, self._updated = self._updated, []
        elif result.rowcount == 0 and not result.returns_rows:
            # There was such a row, and the statement left it alone.
            return
        else:
            given = list(many) or [_given(statement, one)]
            if len(given) == 1:
                given[0] = {**given[0], **_made_key(table, result)}
            if not all(column.name in row for row in given for column in table.primary_key):
                # The database gave it a key that only the statement's own caller learns.
                self._after += (_told(table, row) for row in given)
                return
            which = [_is(table, row) for row in given]
        if which:
            rows = connection.execute(select(table).where(or_(*which)))
            self._after += (_told(table, row._mapping) for row in rows)

    # ---- transactions ----------------------------------------------------------------------------

    def on_savepoint(self, _connection: Connection, _name: object) -> None:
        self._marks.append((len(self._before), len(self._after)))

    def on_savepoint_kept(self, _connection: Connection, _name: str, _context: object) -> None:
        self._marks.pop()

    def on_savepoint_undone(self, _connection: Connection, _name: str, _context: object) -> None:
        num_before, num_after = self._marks.pop()
        del self._before[num_before:]
        del self._after[num_after:]

    def on_undone(self, _connection: Connection) -> None:
        self._before, self._after, self._marks = [], [], []

    def on_commit(self, connection: Connection) -> None:
        before, after = self._before, self._after
        self._before, self._after = [], []
        if before or after:
            append(
                connection,
                at=self._clock(),
                who=self._who,
                what=self._what,
                before=before,
                after=after,
            )


def _is_told(table: object) -> bool:
    return isinstance(table, Table) and table.name not in _SILENT


def _select(connection: Connection, query: Any, given: Mapping[str, Any]) -> list[RowMapping]:
    return [row._mapping for row in connection.execute(query, given)]


def _given(statement: Insert, one: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an insertion, wherever they stand."""
    named = {name: value for name, value in statement.compile().params.items() if value is not None}
    return {**named, **one}


def _made_key(table: Table, result: CursorResult[Any]) -> dict[str, object]:
    """Return the primary key of the one row that was inserted, if it can be asked for."""
    try:
        made = result.inserted_primary_key
    except InvalidRequestError:
        return {}
    names = (column.name for column in table.primary_key)
    return {name: key for name, key in zip(names, made or (), strict=False) if key is not None}


def _is(table: Table, row: Mapping[str, Any] | RowMapping) -> ColumnElement[bool]:
    """Return what is true of a row alone."""
    return and_(*(column == row[column.name] for column in table.primary_key))


def _dependents(
    connection: Connection, table: Table, rows: Sequence[RowMapping]
) -> Iterator[dict[str, object]]:
    """Yield the rows that the database deletes together with others."""
    for other in metadata.sorted_tables if rows else ():
        for key in other.foreign_keys:
            if key.column.table is not table or key.ondelete != "CASCADE":
                continue
            gone: Iterable[object] = {row[key.column.name] for row in rows}
            theirs = _select(connection, select(other).where(key.parent.in_(gone)), {})
            yield from (_told(other, row) for row in theirs)
            yield from _dependents(connection, other, theirs)


def _told(table: Table, row: Mapping[str, Any] | RowMapping) -> dict[str, object]:
    """Return a row as the log has it: without the hashes of secrets."""
    shown = {name: value for name, value in row.items() if not _SECRET.match(str(name))}
    return {"table": table.name, **shown}
