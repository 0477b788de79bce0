"""The end of a batch: its results become files, and its lines are forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence

from fabric.batches.book import COMPLETED, FAILED, Book
from fabric.batches.files import Files
from fabric.batches.records import BatchRecord, BatchStatus, Json, Line
from fabric.batches.results import unasked
from fabric.sql import Offload


class Closing:
    """Closes batches. A hub that is killed meanwhile leaves no trace but contents without a file.

    Args:
        book: The batches.
        files: Their files.
        offload: The database's thread.
    """

    def __init__(self, *, book: Book, files: Files, offload: Offload) -> None:
        self._book = book
        self._files = files
        self._offload = offload

    async def close(self, batch_id: str, errors: Sequence[Json]) -> None:
        """Make files of the results and end the batch.

        Args:
            batch_id: A batch of which no more lines are asked.
            errors: Why not, if that is neither its end nor its caller's wish.
        """
        batch = await self._offload(self._book.finalize, batch_id, errors)
        pending = await asyncio.to_thread(lambda: [*_lines_of(self._book.pending(batch.id))])
        status = _status_of(batch, pending)
        output = await asyncio.to_thread(self._store, self._answered(batch))
        failed = await asyncio.to_thread(self._store, self._failed(batch, pending))
        await self._offload(self._end, batch, status, len(pending), output, failed)
        await self.prune()

    async def prune(self) -> None:
        """Forget the lines of what has ended, not all at once."""
        while await self._offload(self._book.prune):
            pass

    def _store(self, results: Iterator[str]) -> tuple[str, int]:
        return self._files.store(f"{result}\n".encode() for result in results)

    def _answered(self, batch: BatchRecord) -> Iterator[str]:
        return (result for _, result in self._book.results(batch.id, COMPLETED))

    def _failed(self, batch: BatchRecord, pending: Sequence[Line]) -> Iterator[str]:
        yield from (result for _, result in self._book.results(batch.id, FAILED))
        yield from (unasked(batch, line) for line in pending)

    def _end(
        self,
        batch: BatchRecord,
        status: BatchStatus,
        num_unasked: int,
        output: tuple[str, int],
        failed: tuple[str, int],
    ) -> None:
        """Add the files that hold something and end the batch, in one transaction."""
        with self._offload.database.transaction():
            ids = [
                self._add(batch, kind, *stored)
                for kind, stored in (("output", output), ("errors", failed))
            ]
            self._book.end(
                batch.id,
                status,
                num_unasked=num_unasked,
                output_file=ids[0],
                error_file=ids[1],
            )

    def _add(self, batch: BatchRecord, kind: str, file_id: str, num_bytes: int) -> str | None:
        if not num_bytes:
            self._files.path(file_id).unlink()
            return None
        return self._files.add(
            file_id,
            batch.project,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
            num_bytes=num_bytes,
            ttl_s=batch.output_ttl_s,
        ).id


def _lines_of(pages: Iterable[Sequence[Line]]) -> Iterator[Line]:
    return (line for page in pages for line in page)


def _status_of(batch: BatchRecord, pending: Sequence[Line]) -> BatchStatus:
    if batch.cancelling_at is not None:
        return "cancelled"
    if not pending:
        return "completed"
    return "failed" if batch.errors else "expired"
