"""The stand-in's memory: one SQLite file, which survives every kill of the service."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fabric.testing.globus.service.records import Record, RequestLog, Task

R = TypeVar("R", bound=Record)
SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    kind TEXT, id TEXT, document TEXT, PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, group_id TEXT, endpoint TEXT, open INTEGER, document TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_of_group ON tasks (group_id);
CREATE INDEX IF NOT EXISTS open_tasks ON tasks (endpoint) WHERE open;
CREATE TABLE IF NOT EXISTS requests (document TEXT);
CREATE TABLE IF NOT EXISTS violations (text TEXT);
"""


class Store:
    """Records by kind and id, tasks by group and endpoint, and what clients did.

    Several processes and threads may use one file: the service writes, a rig reads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or make the file."""
        self._connection = connection = sqlite3.connect(
            self._path, timeout=30, check_same_thread=False, isolation_level=None
        )
        connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for statements that happen all or not at all."""
        with self._lock:
            assert self._connection is not None, "open() comes first"
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _rows(self, query: str, *values: str) -> list[str]:
        with self._lock:
            assert self._connection is not None, "open() comes first"
            return [row[0] for row in self._connection.execute(query, values)]

    def get(self, kind: type[R], id_: str) -> R | None:
        """Return one record."""
        query = "SELECT document FROM records WHERE kind = ? AND id = ?"
        rows = self._rows(query, kind.__name__, id_)
        return kind.model_validate_json(rows[0]) if rows else None

    def all(self, kind: type[R]) -> list[R]:
        """Return every record of a kind."""
        rows = self._rows("SELECT document FROM records WHERE kind = ?", kind.__name__)
        return [kind.model_validate_json(row) for row in rows]

    def put(self, record: Record) -> None:
        """Add a record, or put it in the place of the one with its id."""
        row = (type(record).__name__, record.id, record.model_dump_json())
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", row)

    def delete(self, record: Record) -> None:
        """Forget a record."""
        key = (type(record).__name__, record.id)
        with self.transaction() as connection:
            connection.execute("DELETE FROM records WHERE kind = ? AND id = ?", key)

    def put_tasks(self, tasks: Iterable[Task]) -> None:
        """Add tasks, or their new states."""
        rows = [(t.id, t.group, t.endpoint, t.outcome is None, t.model_dump_json()) for t in tasks]
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?)", rows)

    def task(self, id_: str) -> Task | None:
        """Return one task."""
        rows = self._rows("SELECT document FROM tasks WHERE id = ?", id_)
        return Task.model_validate_json(rows[0]) if rows else None

    def tasks_of_group(self, group: str, *, limit: int = -1) -> list[Task]:
        """Return the tasks of a group, or some of them."""
        query = f"SELECT document FROM tasks WHERE group_id = ? LIMIT {int(limit)}"  # noqa: S608
        rows = self._rows(query, group)
        return [Task.model_validate_json(row) for row in rows]

    def open_tasks(self, endpoint: str) -> list[Task]:
        """Return the tasks of a user endpoint that have no result."""
        rows = self._rows("SELECT document FROM tasks WHERE endpoint = ? AND open", endpoint)
        return [Task.model_validate_json(row) for row in rows]

    def add_request(self, request: RequestLog) -> None:
        """Note an answered request."""
        with self.transaction() as connection:
            connection.execute("INSERT INTO requests VALUES (?)", (request.model_dump_json(),))

    def requests(self) -> list[RequestLog]:
        """Return the answered requests, the first one first."""
        rows = self._rows("SELECT document FROM requests ORDER BY rowid")
        return [RequestLog.model_validate_json(row) for row in rows]

    def add_violation(self, text: str) -> None:
        """Note that a client exceeded a published limit."""
        with self.transaction() as connection:
            connection.execute("INSERT INTO violations VALUES (?)", (text,))

    def violations(self) -> list[str]:
        """Return every time a client exceeded a published limit."""
        return self._rows("SELECT text FROM violations ORDER BY rowid")
