"""The store: rows in the database, contents in a directory that only the hub may read."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterable, Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import bindparam, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from fabric.artifacts.records import ArtifactRecord, ArtifactSettings
from fabric.artifacts.tables import artifacts
from fabric.errors import ArtifactsFull, BodyTooLarge, Duplicate, NotFound, StorageFull
from fabric.messages import new_id
from fabric.sql import Database, Offload, utc_now

ORPHAN_S = 3600.0
"""How old contents without a row are before they are removed; younger ones may be on their way."""
_BY_ID = select(artifacts).where(artifacts.c.id == bindparam("artifact"))

logger = logging.getLogger(__name__)


class Artifacts:
    """The artifacts of all projects, on the event loop of a hub.

    Equal contents are kept once; every artifact counts in full for its project. Another project's
    artifact, an expired one and none at all are the same answer.

    Args:
        database: An open, migrated database.
        offload: Its thread.
        directory: Where contents are kept.
        settings: The limits.
        clock: The wall clock.
    """

    def __init__(
        self,
        *,
        database: Database,
        offload: Offload,
        directory: Path,
        settings: ArtifactSettings = ArtifactSettings(),  # noqa: B008
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.settings = settings
        self._database = database
        self._offload = offload
        self._directory = directory
        self._clock = clock
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the directory, private to its owner, and begin to remove what expires."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        """Stop sweeping. Calling it twice is harmless."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
            self._sweeping = None

    async def keep(
        self,
        project: str,
        pieces: AsyncIterable[bytes],
        *,
        artifact_id: str | None = None,
        run: str | None = None,
        part: str | None = None,
        limit_bytes: int | None = None,
        ttl_s: float | None = None,
    ) -> ArtifactRecord:
        """Keep contents as they come, until they expire.

        Args:
            project: Whose they are.
            pieces: The contents.
            artifact_id: Its id; a fresh one by default.
            run: Which run saved them.
            part: Which run of that run's program.
            limit_bytes: The most they may have, if less than the settings allow; with a run, the
                most that all it has kept may have.
            ttl_s: How long they are kept, if not as the settings say.

        Raises:
            BodyTooLarge: There are more.
            ArtifactsFull: The project's artifacts take as much as they may.
            Duplicate: There is one of this id.
            StorageFull: The disk is full.
        """
        limit = min(self.settings.file_bytes, limit_bytes or self.settings.file_bytes)
        artifact_id = artifact_id or new_id("art")
        begun = self._directory / f".{artifact_id}-{time.monotonic_ns()}"
        digest, num_bytes = hashlib.sha256(), 0
        try:
            file = os.fdopen(os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            with file:
                async for piece in pieces:
                    num_bytes += len(piece)
                    if num_bytes > limit:
                        raise BodyTooLarge(limit_bytes=limit)
                    digest.update(piece)
                    await asyncio.to_thread(file.write, piece)
            now = self._clock()
            record = ArtifactRecord(
                id=artifact_id,
                project=project,
                run=run,
                part=part,
                sha256=digest.hexdigest(),
                num_bytes=num_bytes,
                created_at=now,
                expires_at=now + timedelta(seconds=self.settings.ttl_s if ttl_s is None else ttl_s),
            )
            await self._offload(self._add, record, begun, limit)
        except OSError as error:
            raise StorageFull(reason=str(error)) from error
        finally:
            begun.unlink(missing_ok=True)
        return record

    async def get(self, artifact_id: str, *, project: str) -> ArtifactRecord:
        """Return an artifact.

        Raises:
            NotFound: The project has none of this id, or it has expired.
        """
        return await self._offload(self._get, artifact_id, project)

    async def read(self, artifact_id: str, *, project: str) -> bytes:
        """Return the contents of an artifact.

        Raises:
            NotFound: The project has none of this id, or it has expired.
        """
        record = await self.get(artifact_id, project=project)
        try:
            return await asyncio.to_thread(self.path(record).read_bytes)
        except FileNotFoundError:
            raise NotFound(kind="artifact", name=artifact_id) from None

    async def delete(self, artifact_id: str, *, project: str) -> None:
        """Forget an artifact.

        Raises:
            NotFound: The project has none of this id, or it has expired.
        """
        await self._offload(self._delete, artifact_id, project)

    def path(self, record: ArtifactRecord) -> Path:
        """Return where the contents are."""
        return self._directory / record.sha256

    # ---- on the database's thread ---------------------------------------------------------------

    def _add(self, record: ArtifactRecord, begun: Path, limit_bytes: int) -> None:
        taken = select(func.sum(artifacts.c.num_bytes)).where(
            artifacts.c.project == record.project, artifacts.c.expires_at > self._clock()
        )
        of_run = taken.where(artifacts.c.run == record.run)
        with self._database.transaction() as connection:
            total = record.num_bytes + int(connection.execute(taken).scalar() or 0)
            if total > self.settings.project_bytes:
                raise ArtifactsFull(num_bytes=total, limit_bytes=self.settings.project_bytes)
            kept = int(connection.execute(of_run).scalar() or 0)
            if record.run is not None and record.num_bytes + kept > limit_bytes:
                raise BodyTooLarge(limit_bytes=limit_bytes)
            try:
                connection.execute(insert(artifacts), asdict(record))
            except IntegrityError as error:
                raise Duplicate(kind="artifact", name=record.id) from error
            # In the transaction, so that no sweep comes between the contents and their row.
            begun.rename(self.path(record))

    def _get(self, artifact_id: str, project: str) -> ArtifactRecord:
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"artifact": artifact_id}).first()
        if row is None or row.project != project or row.expires_at <= self._clock():
            raise NotFound(kind="artifact", name=artifact_id)
        return ArtifactRecord(**row._mapping)

    def _delete(self, artifact_id: str, project: str) -> None:
        with self._database.transaction() as connection:
            record = self._get(artifact_id, project)
            connection.execute(delete(artifacts).where(artifacts.c.id == record.id))
            left = select(artifacts.c.id).where(artifacts.c.sha256 == record.sha256)
            if connection.execute(left).first() is None:
                self.path(record).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what has expired, and contents that belong to nothing. Blocks."""
        with self._database.transaction() as connection:
            connection.execute(delete(artifacts).where(artifacts.c.expires_at <= self._clock()))
            known = set(connection.execute(select(artifacts.c.sha256).distinct()).scalars())
            for path in self._directory.iterdir():
                if path.name not in known and not _is_on_its_way(path):
                    path.unlink(missing_ok=True)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self._offload(self.sweep)
            except Exception:
                logger.exception("artifacts not swept; it is tried again")
            await asyncio.sleep(self.settings.sweep_s)


def _is_on_its_way(path: Path) -> bool:
    try:
        return path.name[0] == "." and time.time() - path.stat().st_mtime < ORPHAN_S
    except FileNotFoundError:  # it has arrived meanwhile
        return True
