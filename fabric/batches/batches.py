"""The room's face: files, batches, and the runner that works on them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from fabric.auth import Identity, Keys, Users
from fabric.batches.answerer import Answerer
from fabric.batches.book import Book
from fabric.batches.files import Files
from fabric.batches.records import (
    COMPLETION_WINDOW_S,
    ENDPOINTS,
    BatchRecord,
    BatchSettings,
    FileRecord,
)
from fabric.batches.runner import Runner
from fabric.errors import RequestInvalid
from fabric.messages import new_id
from fabric.sql import Database, Offload, utc_now


class Batches:
    """Files and batches of a hub.

    Args:
        database: An open, migrated database.
        offload: Its thread.
        keys: Who may still ask.
        answerer: Answers the lines.
        directory: Where contents are kept; hubs over one database share it.
        settings: The limits.
    """

    def __init__(
        self,
        *,
        database: Database,
        offload: Offload,
        keys: Keys,
        answerer: Answerer,
        directory: Path,
        settings: BatchSettings = BatchSettings(),  # noqa: B008
    ) -> None:
        self.settings = settings
        self.files = Files(database, directory, settings)
        self.book = Book(database, lease_s=settings.lease_s)
        self._offload = offload
        self._runner = Runner(
            book=self.book,
            files=self.files,
            offload=offload,
            keys=keys,
            users=Users(database),
            answerer=answerer,
            settings=settings,
        )

    async def start(self) -> None:
        """Take up the batches that are not over."""
        self.files.prepare()
        self._runner.start()

    async def close(self) -> None:
        """Leave the batches where they are, for the next hub. Calling it twice is harmless."""
        await self._runner.close()

    def upload(
        self, project: str, source: BinaryIO, *, filename: str, ttl_s: float | None
    ) -> FileRecord:
        """Keep an input file. Blocks.

        Raises:
            RequestInvalid: It is empty.
            BodyTooLarge: It is larger than a file may be.
            FilesFull: The project's files take as much as they may.
            StorageFull: The disk is full.
        """
        file_id, num_bytes = self.files.copy(source)
        if not num_bytes:
            self.files.path(file_id).unlink()
            raise RequestInvalid(param="file", value=filename, reason="the file is empty")
        return self.files.add(
            file_id,
            project,
            filename=filename,
            purpose="batch",
            num_bytes=num_bytes,
            ttl_s=ttl_s or self.settings.file_ttl_s,
        )

    async def create(
        self,
        caller: Identity,
        *,
        input_file: str,
        endpoint: str,
        metadata: Mapping[str, str],
        output_ttl_s: float | None = None,
    ) -> BatchRecord:
        """Begin a batch.

        Raises:
            NotFound: The caller's project has no such file.
            RequestInvalid: The file is an output, or there is no such endpoint.
        """
        if endpoint not in ENDPOINTS:
            reason = f"there are {' and '.join(ENDPOINTS)}"
            raise RequestInvalid(param="endpoint", value=endpoint, reason=reason)
        file = await self._offload(self.files.get, input_file, project=caller.project)
        if file.purpose != "batch":
            reason = "it is the output of a batch; upload a file with purpose 'batch'"
            raise RequestInvalid(param="input_file_id", value=input_file, reason=reason)
        now = utc_now()
        record = BatchRecord(
            id=new_id("batch"),
            project=caller.project,
            key_id=caller.key_id,
            endpoint=endpoint,
            input_file=input_file,
            output_file=None,
            error_file=None,
            output_ttl_s=output_ttl_s or self.settings.file_ttl_s,
            model=None,
            metadata=dict(metadata),
            status="validating",
            errors=[],
            num_lines=0,
            num_completed=0,
            num_failed=0,
            charge_usu=0,
            life=0,
            runner=None,
            lease_expires_at=None,
            created_at=now,
            in_progress_at=None,
            cancelling_at=None,
            finalizing_at=None,
            ended_at=None,
            expires_at=now + timedelta(seconds=COMPLETION_WINDOW_S),
        )
        await self._offload(self.book.add, record)
        self._runner.wake()
        return record

    async def cancel(self, batch_id: str, *, project: str) -> BatchRecord:
        """Ask for the end of a batch; what is under way is dropped and not charged.

        Raises:
            NotFound: The project has none of this id.
            BatchOver: It has ended.
        """
        record = await self._offload(self.book.cancel, batch_id, project=project)
        self._runner.wake()
        return record
