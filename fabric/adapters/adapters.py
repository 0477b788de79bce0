"""Adapters: rows in the database, contents in a directory that only the hub may read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, select

from fabric.adapters.records import AdapterRecord, AdapterSettings
from fabric.adapters.tables import adapters
from fabric.errors import AdapterInvalid, AdaptersFull, Duplicate, NotFound, StorageFull
from fabric.payloads.lora import digest_of, read_peft
from fabric.sql import Database, utc_now


class Adapters:
    """The adapters of all projects. Thread-safe; everything here blocks.

    Equal adapters are kept once, whoever uploaded them; the last one to go takes the contents.

    Args:
        database: An open, migrated database.
        directory: Where contents are kept, by digest.
        settings: The limits.
        clock: The wall clock.
    """

    def __init__(
        self,
        database: Database,
        directory: Path,
        settings: AdapterSettings = AdapterSettings(),  # noqa: B008
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.settings = settings
        self._database = database
        self._directory = directory
        self._clock = clock

    def prepare(self) -> None:
        """Make the directory, private to its owner."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(
        self, project: str, name: str, *, model: str, config: bytes, weights: bytes
    ) -> AdapterRecord:
        """Keep what PEFT saved; the same again changes nothing.

        Args:
            project: Whose it is.
            name: What the project calls it.
            model: The version it is for, as ``name@revision``.
            config: ``adapter_config.json``.
            weights: ``adapter_model.safetensors``.

        Raises:
            AdapterInvalid: It is not plain LoRA of linear layers, or its files are damaged.
            Duplicate: The project has another adapter of this name.
            AdaptersFull: The project has as many as it may, or they take as much as they may.
            StorageFull: The disk is full.
        """
        lora = read_peft(name, config, weights)
        data = lora.to_bytes()
        record = AdapterRecord(
            project=project,
            name=name,
            model=model,
            digest=digest_of(data),
            num_bytes=len(data),
            rank=lora.rank,
            num_layers=len(lora.layers),
            created_at=self._clock(),
        )
        with self._database.transaction() as connection:
            former = self._find(connection, project, name)
            if former is not None:
                if (former.digest, former.model) == (record.digest, model):
                    return former
                raise Duplicate(kind="adapter", name=name)
            self._check_room(connection, record)
            connection.execute(insert(adapters), asdict(record))
            # Inside the transaction: a row that is there has its contents.
            self._write(record.digest, data)
        return record

    def get(self, name: str, *, project: str) -> AdapterRecord:
        """Return an adapter.

        Raises:
            NotFound: The project has none of this name.
        """
        with self._database.read() as connection:
            record = self._find(connection, project, name)
        if record is None:
            raise NotFound(kind="adapter", name=name)
        return record

    def find(self, name: str, *, project: str, model: str) -> str:
        """Return the digest of the adapter that a request names.

        Raises:
            NotFound: The project has none of this name.
            AdapterInvalid: It was made for another version than ``model``.
        """
        record = self.get(name, project=project)
        if record.model != model:
            reason = f"it was made for {record.model}, and the request asks {model}"
            raise AdapterInvalid(adapter=name, reason=reason)
        return record.digest

    def listed(self, project: str) -> list[AdapterRecord]:
        """Return a project's adapters, in order of name."""
        query = select(adapters).where(adapters.c.project == project).order_by(adapters.c.name)
        with self._database.read() as connection:
            return [AdapterRecord(**row._mapping) for row in connection.execute(query)]

    def delete(self, name: str, *, project: str) -> None:
        """Forget an adapter; what runs with it runs to its end.

        Raises:
            NotFound: The project has none of this name.
        """
        mine = (adapters.c.project == project) & (adapters.c.name == name)
        with self._database.transaction() as connection:
            record = self._find(connection, project, name)
            if record is None:
                raise NotFound(kind="adapter", name=name)
            connection.execute(delete(adapters).where(mine))
            others = select(adapters.c.name).where(adapters.c.digest == record.digest)
            if connection.execute(others).first() is None:
                self._path(record.digest).unlink(missing_ok=True)

    def contents(self, digest: str, *, model: str) -> Path:
        """Return the file of an adapter, for an instance of the version it was made for.

        Raises:
            NotFound: There is none of this digest for this version.
        """
        query = select(adapters.c.name).where(
            adapters.c.digest == digest, adapters.c.model == model
        )
        with self._database.read() as connection:
            known = connection.execute(query).first() is not None
        if not known or not (path := self._path(digest)).is_file():
            raise NotFound(kind="adapter", name=digest)
        return path

    def _find(self, connection: Connection, project: str, name: str) -> AdapterRecord | None:
        query = select(adapters).where(adapters.c.project == project, adapters.c.name == name)
        row = connection.execute(query).first()
        return None if row is None else AdapterRecord(**row._mapping)

    def _check_room(self, connection: Connection, record: AdapterRecord) -> None:
        query = select(func.count(), func.coalesce(func.sum(adapters.c.num_bytes), 0)).where(
            adapters.c.project == record.project
        )
        number, num_bytes = connection.execute(query).one()
        if number + 1 > (limit := self.settings.project_adapters):
            raise AdaptersFull(what="pieces", limit=limit)
        if num_bytes + record.num_bytes > (limit := self.settings.project_bytes):
            raise AdaptersFull(what="bytes", limit=limit)

    def _path(self, digest: str) -> Path:
        return self._directory / digest.replace(":", "-")

    def _write(self, digest: str, data: bytes) -> None:
        """Write contents whole or not at all."""
        path = self._path(digest)
        try:
            handle, partial = tempfile.mkstemp(dir=self._directory, prefix=".partial-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(partial).replace(path)
            finally:
                Path(partial).unlink(missing_ok=True)
        except OSError as error:
            raise StorageFull(reason=str(error)) from error
