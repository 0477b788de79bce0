"""The books of batches: what they are, who works on them, and what became of each line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, bindparam, delete, exists, func, insert, or_, select, update
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from fabric.batches.records import OPEN, BatchRecord, BatchStatus, Json, Line
from fabric.batches.tables import batch_lines, batches
from fabric.errors import BatchOver, NotFound
from fabric.sql import Database, utc_now

PENDING, COMPLETED, FAILED = "pending", "completed", "failed"
_PAGE, _AT_ONCE = 256, 1000
_BY_ID = select(batches).where(batches.c.id == bindparam("batch"))
_ANY_OPEN = select(exists().where(batches.c.status.in_(OPEN)))
_LINE = update(batch_lines).where(
    batch_lines.c.batch == bindparam("of_batch"),
    batch_lines.c.number == bindparam("at"),
    batch_lines.c.state == PENDING,
)


class Book:
    """The batches of all projects over one database. Thread-safe; everything here blocks.

    Args:
        database: An open, migrated database.
        lease_s: How long a batch is a runner's that does not come back to it.
        clock: The wall clock.
    """

    def __init__(
        self, database: Database, *, lease_s: float, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._clock = clock

    # ---- as callers see them --------------------------------------------------------------------

    def add(self, record: BatchRecord) -> BatchRecord:
        """Store a new batch."""
        with self._database.transaction() as connection:
            connection.execute(insert(batches), asdict(record))
        return record

    def get(self, batch_id: str, *, project: str | None = None) -> BatchRecord:
        """Return a batch, of this project if one is given.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"batch": batch_id}).first()
        if row is None or project not in (None, row.project):
            raise NotFound(kind="batch", name=batch_id)
        return BatchRecord(**row._mapping)

    def listed(self, project: str, *, after: str | None, limit: int) -> list[BatchRecord]:
        """Return a project's batches, newest first, those after the batch ``after`` if given.

        Raises:
            NotFound: The project has no batch ``after``.
        """
        query = select(batches).where(batches.c.project == project)
        if after is not None:
            last = self.get(after, project=project)
            same = (batches.c.created_at == last.created_at) & (batches.c.id > last.id)
            query = query.where(or_(batches.c.created_at < last.created_at, same))
        query = query.order_by(batches.c.created_at.desc(), batches.c.id).limit(limit)
        with self._database.read() as connection:
            return [BatchRecord(**row._mapping) for row in connection.execute(query)]

    def cancel(self, batch_id: str, *, project: str) -> BatchRecord:
        """Ask for the end of a batch. Twice is harmless.

        Raises:
            NotFound: The project has none of this id.
            BatchOver: It has ended, or is about to.
        """
        with self._database.transaction():
            batch = self.get(batch_id, project=project)
            if batch.status in ("validating", "in_progress"):
                self._set(batch_id, status="cancelling", cancelling_at=self._clock())
            elif batch.cancelling_at is None or batch.status == "cancelled":
                raise BatchOver(batch=batch_id, status=batch.status)
            return self.get(batch_id)

    # ---- as runners see them --------------------------------------------------------------------

    def claim(self, runner: str, limit: int) -> list[BatchRecord]:
        """Keep the batches of a runner, take up others that nobody works on, and return all.

        A batch that is taken up begins a new life. Of one project only the oldest are, a quarter
        of what a runner takes: no project keeps the others waiting.
        """
        with self._database.read() as connection:
            if not connection.execute(_ANY_OPEN).scalar_one():
                return []  # as nearly always; nobody has waited for a lock
        now = self._clock()
        until = now + timedelta(seconds=self._lease_s)
        rank = func.row_number().over(
            partition_by=batches.c.project, order_by=(batches.c.created_at, batches.c.id)
        )
        ranked = select(batches, rank.label("rank")).where(batches.c.status.in_(OPEN)).subquery()
        free = (
            select(ranked.c.id)
            .where(ranked.c.rank <= max(1, limit // 4), _unheld(ranked.c, now))
            .order_by(ranked.c.rank, ranked.c.created_at)
        )
        with self._database.transaction() as connection:
            own = (batches.c.runner == runner) & batches.c.status.in_(OPEN)
            connection.execute(update(batches).where(own).values(lease_expires_at=until))
            held = connection.execute(select(batches.c.id).where(own)).scalars().all()
            wanted = connection.execute(free.limit(max(0, limit - len(held)))).scalars().all()
            # Another hub may have been faster since they were read.
            taken = connection.execute(
                update(batches)
                .where(batches.c.id.in_(wanted), _unheld(batches.c, now))
                .values(runner=runner, lease_expires_at=until, life=batches.c.life + 1)
                .returning(batches.c.id)
            ).scalars()
            return [self.get(batch_id) for batch_id in (*held, *taken.all())]

    def release(self, runner: str, batch_id: str | None = None) -> None:
        """Give one batch of a runner to whoever claims it first, or all."""
        query = update(batches).where(batches.c.runner == runner)
        if batch_id is not None:
            query = query.where(batches.c.id == batch_id)
        with self._database.transaction() as connection:
            connection.execute(query.values(runner=None, lease_expires_at=None))

    def forget_lines(self, batch_id: str) -> None:
        """Remove what was written of a batch that was being read."""
        with self._database.transaction() as connection:
            connection.execute(delete(batch_lines).where(batch_lines.c.batch == batch_id))

    def add_lines(self, batch_id: str, lines: Sequence[Line]) -> None:
        """Add lines that were read."""
        rows = [{**asdict(line), "batch": batch_id, "state": PENDING} for line in lines]
        with self._database.transaction() as connection:
            connection.execute(insert(batch_lines), rows)

    def begin(self, batch_id: str, *, model: str, num_lines: int) -> BatchRecord:
        """Note that a batch was read and found valid."""
        with self._database.transaction():
            batch = self.get(batch_id)
            status = "in_progress" if batch.status == "validating" else batch.status
            self._set(
                batch_id,
                status=status,
                model=model,
                num_lines=num_lines,
                in_progress_at=self._clock(),
            )
            return self.get(batch_id)

    def pending(self, batch_id: str) -> Iterator[Sequence[Line]]:
        """Yield the lines without a result, a page at a time."""
        columns = [batch_lines.c[name] for name in Line.__slots__]
        last = 0
        while True:
            query = select(*columns).where(
                batch_lines.c.batch == batch_id,
                batch_lines.c.state == PENDING,
                batch_lines.c.number > last,
            )
            with self._database.read() as connection:
                rows = connection.execute(query.order_by(batch_lines.c.number).limit(_PAGE))
                page = [Line(**row._mapping) for row in rows]
            if not page:
                return
            yield page
            last = page[-1].number

    def finish_line(
        self, batch_id: str, number: int, result: str, *, charge_usu: int | None
    ) -> bool:
        """Store a line's result, unless it has one; say whether it was stored.

        Args:
            batch_id: The batch.
            number: The line.
            result: A line of the output file, or of the error file if there is no charge.
            charge_usu: What it cost.
        """
        state = FAILED if charge_usu is None else COMPLETED
        with self._database.transaction() as connection:
            done = connection.execute(
                _LINE.values(state=state, result=result), {"of_batch": batch_id, "at": number}
            )
            if not done.rowcount:
                return False
            counter = batches.c.num_failed if charge_usu is None else batches.c.num_completed
            cost = {"charge_usu": batches.c.charge_usu + (charge_usu or 0)}
            self._set(batch_id, **{counter.name: counter + 1, **cost})
            return True

    def finalize(self, batch_id: str, errors: Sequence[Json]) -> BatchRecord:
        """Note that no more lines are asked; ``errors`` say why, if that is not the end."""
        with self._database.transaction():
            batch = self.get(batch_id)
            values: Json = {"errors": [*batch.errors, *errors]}
            if batch.status == "in_progress":
                values |= {"status": "finalizing", "finalizing_at": self._clock()}
            self._set(batch_id, **values)
            return self.get(batch_id)

    def results(self, batch_id: str, state: str) -> Iterator[tuple[Line, str]]:
        """Yield the lines in this state with their results, in the order of the input."""
        last = 0
        while True:
            query = select(batch_lines).where(
                batch_lines.c.batch == batch_id,
                batch_lines.c.state == state,
                batch_lines.c.number > last,
            )
            with self._database.read() as connection:
                rows = connection.execute(query.order_by(batch_lines.c.number).limit(_PAGE)).all()
            for row in rows:
                yield Line(**{name: getattr(row, name) for name in Line.__slots__}), row.result
            if not rows:
                return
            last = rows[-1].number

    def end(
        self,
        batch_id: str,
        status: BatchStatus,
        *,
        errors: Sequence[Json] = (),
        num_unasked: int = 0,
        output_file: str | None = None,
        error_file: str | None = None,
    ) -> BatchRecord:
        """Close a batch; its results are in the files."""
        with self._database.transaction():
            batch = self.get(batch_id)
            self._set(
                batch_id,
                status=status,
                errors=[*batch.errors, *errors],
                num_failed=batch.num_failed + num_unasked,
                output_file=output_file,
                error_file=error_file,
                ended_at=self._clock(),
                runner=None,
                lease_expires_at=None,
            )
            return self.get(batch_id)

    def prune(self) -> int:
        """Forget some lines of a batch that has ended, and return how many: the database is for
        others too."""
        ended = select(batches.c.id).where(
            batches.c.ended_at.is_not(None),
            exists().where(batch_lines.c.batch == batches.c.id),
        )
        with self._database.transaction() as connection:
            if (batch_id := connection.execute(ended.limit(1)).scalar()) is None:
                return 0
            own = batch_lines.c.batch == batch_id
            first = select(batch_lines.c.number).where(own).order_by(batch_lines.c.number)
            some = own & batch_lines.c.number.in_(first.limit(_AT_ONCE))
            return connection.execute(delete(batch_lines).where(some)).rowcount

    def _set(self, batch_id: str, **values: object) -> None:
        with self._database.transaction() as connection:
            connection.execute(update(batches).where(batches.c.id == batch_id).values(**values))


def _unheld(columns: ReadOnlyColumnCollection[str, Any], now: datetime) -> ColumnElement[bool]:
    return or_(columns.runner.is_(None), columns.lease_expires_at <= now)
