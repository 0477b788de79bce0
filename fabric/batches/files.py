"""Files: rows in the database, contents in a directory that only the hub may read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import bindparam, delete, func, insert, select

from fabric.batches.records import OPEN, BatchSettings, FileRecord
from fabric.batches.tables import batches, files
from fabric.errors import BodyTooLarge, FileInUse, FilesFull, NotFound, StorageFull
from fabric.messages import new_id
from fabric.sql import Database, utc_now

ORPHAN_S = 3600.0
"""How old contents without a row are before they are removed; younger ones may be on their way."""
_PIECE_BYTES = 2**20
_BY_ID = select(files).where(files.c.id == bindparam("file"))


class Files:
    """The files of all projects. Thread-safe; everything here blocks.

    Args:
        database: An open, migrated database.
        directory: Where contents are kept.
        settings: The limits.
        clock: The wall clock.
    """

    def __init__(
        self,
        database: Database,
        directory: Path,
        settings: BatchSettings,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._directory = directory
        self._settings = settings
        self._clock = clock

    def prepare(self) -> None:
        """Make the directory, private to its owner."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    # ---- contents -------------------------------------------------------------------------------

    def store(self, pieces: Iterable[bytes], *, limit_bytes: int | None = None) -> tuple[str, int]:
        """Write contents to the disk; return the id of a file to be and its size in bytes.

        Raises:
            BodyTooLarge: It is over the limit.
            StorageFull: The disk is full.
        """
        file_id, num_bytes = new_id("file"), 0
        path = self.path(file_id)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    num_bytes += len(piece)
                    if limit_bytes is not None and num_bytes > limit_bytes:
                        raise BodyTooLarge(limit_bytes=limit_bytes)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageFull(reason=str(error)) from error
            raise
        return file_id, num_bytes

    def copy(self, source: BinaryIO) -> tuple[str, int]:
        """``store`` what a file holds, up to the largest there may be."""
        pieces = iter(lambda: source.read(_PIECE_BYTES), b"")
        return self.store(pieces, limit_bytes=self._settings.file_bytes)

    def path(self, file_id: str) -> Path:
        """Return where the contents of a file are."""
        return self._directory / file_id

    def read(self, file_id: str, offset_bytes: int, num_bytes: int) -> bytes:
        """Return a part of the contents."""
        with self.path(file_id).open("rb") as file:
            file.seek(offset_bytes)
            return file.read(num_bytes)

    # ---- rows -----------------------------------------------------------------------------------

    def add(
        self,
        file_id: str,
        project: str,
        *,
        filename: str,
        purpose: str,
        num_bytes: int,
        ttl_s: float,
    ) -> FileRecord:
        """Make a file of stored contents.

        Raises:
            FilesFull: With it, the project's inputs would take more than they may; the contents
                are removed.
        """
        now = self._clock()
        record = FileRecord(
            id=file_id,
            project=project,
            filename=filename,
            purpose=purpose,
            num_bytes=num_bytes,
            created_at=now,
            expires_at=now + timedelta(seconds=ttl_s),
        )
        limit_bytes = self._settings.project_bytes
        with self._database.transaction() as connection:
            taken = select(func.sum(files.c.num_bytes)).where(files.c.project == project)
            total = num_bytes + int(connection.execute(taken).scalar() or 0)
            # What was computed and charged is kept in any case.
            if total > limit_bytes and purpose == "batch":
                self.path(file_id).unlink(missing_ok=True)
                raise FilesFull(num_bytes=total, limit_bytes=limit_bytes)
            connection.execute(insert(files), asdict(record))
        return record

    def get(self, file_id: str, *, project: str) -> FileRecord:
        """Return a file.

        Raises:
            NotFound: The project has none of this id.
        """
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"file": file_id}).first()
        if row is None or row.project != project or row.expires_at <= self._clock():
            raise NotFound(kind="file", name=file_id)
        return FileRecord(**row._mapping)

    def listed(
        self,
        project: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        oldest_first: bool = False,
    ) -> list[FileRecord]:
        """Return a project's files, newest first, those after the file ``after`` if that is given.

        Raises:
            NotFound: The project has no file ``after``.
        """
        query = select(files).where(files.c.project == project, files.c.expires_at > self._clock())
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            query = query.order_by(files.c.created_at, files.c.id)
            records = [FileRecord(**row._mapping) for row in connection.execute(query)]
        records = records if oldest_first else records[::-1]
        if after is None:
            return records
        ids = [record.id for record in records]
        if after not in ids:
            raise NotFound(kind="file", name=after)
        return records[ids.index(after) + 1 :]

    def delete(self, file_id: str, *, project: str) -> None:
        """Remove a file and its contents.

        Raises:
            NotFound: The project has none of this id.
            FileInUse: A batch reads it.
        """
        with self._database.transaction() as connection:
            self.get(file_id, project=project)
            reader = select(batches.c.id).where(
                batches.c.input_file == file_id, batches.c.status.in_(OPEN)
            )
            if (batch := connection.execute(reader).scalar()) is not None:
                raise FileInUse(file=file_id, batch=batch)
            connection.execute(delete(files).where(files.c.id == file_id))
        self.path(file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what has expired, and contents that belong to no file."""
        read = select(batches.c.input_file).where(batches.c.status.in_(OPEN))
        with self._database.transaction() as connection:
            connection.execute(
                delete(files).where(files.c.expires_at <= self._clock(), files.c.id.not_in(read))
            )
            known = set(connection.execute(select(files.c.id)).scalars())
        for path in self._directory.iterdir():
            if path.name not in known and time.time() - path.stat().st_mtime > ORPHAN_S:
                path.unlink(missing_ok=True)
