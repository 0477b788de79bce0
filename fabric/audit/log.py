"""The audit log: entries that are only ever added, each with the hash of the one before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, RowMapping, insert, select

from fabric.audit.tables import audit
from fabric.errors import AuditBroken
from fabric.sql import Database

Rows = Sequence[Mapping[str, object]]
"""Rows of tables, each with its ``table``."""

FIRST = "0" * 64
"""What the first entry follows."""

_PAGE = 500
_LAST = select(audit.c.seq, audit.c.sha256).order_by(audit.c.seq.desc()).limit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One transaction of an administrator; ``sha256`` is of all the rest."""

    seq: int
    at: datetime
    who: str
    what: str
    before: Rows
    after: Rows
    previous_sha256: str
    sha256: str


class AuditLog:
    """The log of one database.

    Whoever can write the database's file can also write a whole new chain. What shows that is a
    hash of the last entry that was noted elsewhere: ``verify`` looks for it.

    Args:
        database: An open, migrated database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def entries(self, *, since: datetime | None = None, limit: int = 100) -> list[AuditEntry]:
        """Return the latest entries, newest first."""
        query = select(audit).order_by(audit.c.seq.desc()).limit(limit)
        if since is not None:
            query = query.where(audit.c.at >= since)
        with self._database.read() as connection:
            return [_to_entry(row._mapping) for row in connection.execute(query)]

    def verify(self, *, noted_sha256: str | None = None) -> tuple[int, str]:
        """Check the whole chain; return how many entries there are, and the hash of the last.

        Args:
            noted_sha256: What an earlier check returned; it must still be there.

        Raises:
            AuditBroken: An entry was changed, taken out or put in.
        """
        seq, previous = 0, FIRST
        is_there = noted_sha256 in (None, FIRST)
        with self._database.read() as connection:
            for row in _all(connection):
                seq += 1
                if row["seq"] != seq:
                    reason = f"it is missing, and {row['seq']} comes next"
                    raise AuditBroken(seq=seq, reason=reason)
                if row["previous_sha256"] != previous:
                    raise AuditBroken(seq=seq, reason="it does not follow the entry before it")
                if row["sha256"] != _hash(row):
                    raise AuditBroken(seq=seq, reason="it does not have the hash it was given")
                previous = str(row["sha256"])
                is_there = is_there or previous == noted_sha256
        if not is_there:
            reason = f"no entry up to it has the hash {noted_sha256}, which was noted before"
            raise AuditBroken(seq=seq, reason=reason)
        return seq, previous


def append(
    connection: Connection, *, at: datetime, who: str, what: str, before: Rows, after: Rows
) -> None:
    """Add an entry, as part of the transaction that it tells of."""
    if connection.dialect.name == "postgresql":
        # Two that follow the same entry would break the chain. SQLite has one writer anyway.
        connection.exec_driver_sql("LOCK TABLE audit IN SHARE ROW EXCLUSIVE MODE")
    last = connection.execute(_LAST).first()
    row: dict[str, object] = {
        "seq": 1 if last is None else last.seq + 1,
        "at": at,
        "who": who,
        "what": what,
        "before": _to_text(before),
        "after": _to_text(after),
        "previous_sha256": FIRST if last is None else last.sha256,
    }
    connection.execute(insert(audit), row | {"sha256": _hash(row)})


def _all(connection: Connection) -> Iterator[RowMapping]:
    seq = 0
    while page := connection.execute(
        select(audit).where(audit.c.seq > seq).order_by(audit.c.seq).limit(_PAGE)
    ).all():
        for row in page:
            yield row._mapping
        seq = page[-1].seq


def _hash(row: Mapping[str, object] | RowMapping) -> str:
    at = row["at"]
    assert isinstance(at, datetime)
    fields = ("who", "what", "before", "after", "previous_sha256")
    told = [row["seq"], at.isoformat(), *(row[name] for name in fields)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _to_text(rows: Rows) -> str:
    return json.dumps(rows, sort_keys=True, default=str)


def _to_entry(row: RowMapping) -> AuditEntry:
    told = {"before": json.loads(row["before"]), "after": json.loads(row["after"])}
    return AuditEntry(**{**row, **told})
