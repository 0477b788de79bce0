"""Brings the files of a model version to a site, by digest.

``run_dir/versions/`` holds one folder a digest. Files are written in a hidden folder beside it,
which is renamed when every one of them is there and is what the manifest says: whoever sees a
version sees all of it. What an interrupted replication has fetched is used by the next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import ValidationError

from fabric.errors import (
    DigestMismatch,
    DiskTooSmall,
    ManifestInvalid,
    PayloadInvalid,
    ReplicationFailed,
)
from fabric.payloads.envelope import unpack
from fabric.payloads.manifest import MANIFEST_FILE, FileSource, Manifest, get_manifest
from fabric.payloads.store import PayloadStore, Reference

CHUNK_BYTES = 2**22
SPARE_BYTES = 2**26
"""What is left free on the disk."""
NUM_TRIES = 2

Progress = Callable[[int, int], None]
"""Told the bytes that are there, and the bytes of all files."""


class Hasher(Protocol):
    """What sha256 and blake3 have in common."""

    def update(self, data: memoryview, /) -> object:
        """Take more bytes in."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""


class Nearer(Protocol):
    """Places that may have files nearer than where a manifest says; none of them is believed."""

    def open(self, file: FileSource, at: int) -> io.BufferedIOBase | None:
        """Return a file's bytes from ``at`` on; ``None`` if nobody has them (any more).

        A stream that ends too early is one whose place is gone: another is asked for.
        """

    def distrust(self, file: FileSource) -> bool:
        """Give up whoever gave of a file that is not what it should be; say whether anybody did."""


def replicate(
    manifest: Mapping[str, Any],
    run_dir: str | Path,
    *,
    stores: Iterable[PayloadStore] = (),
    progress: Progress = lambda _done, _total: None,
    nearer: Nearer | None = None,
) -> dict[str, Any]:
    """Bring a version's files to this site, once, whoever else is at it.

    Args:
        manifest: A ``Manifest`` as JSON.
        run_dir: The site's directory; the files go to ``versions/<digest>`` below it.
        stores: Where sources that are references lead.
        progress: Called as bytes arrive.
        nearer: Is asked for files before their own sources are.

    Returns:
        ``digest``, ``path`` of the folder, ``num_files``, ``size_bytes`` of all, ``fetched_bytes``
        of them now, and ``present``: whether nothing had to be done.

    Raises:
        ManifestInvalid: The manifest is malformed or leads out of its folder.
        DiskTooSmall: The files do not fit.
        DigestMismatch: A file is not what the manifest says, twice.
        ReplicationFailed: A source cannot be read, or the run directory not be written.
        PayloadError: A reference cannot be followed.
    """
    wanted = get_manifest(manifest)
    versions = Path(run_dir).expanduser().absolute() / "versions"
    folder = versions / wanted.digest.replace(":", "-")
    try:
        versions.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(versions / f".{folder.name}.lock"):
            present = _is_whole(folder, wanted)
            fetch = _Fetch(wanted, stores, progress, nearer)
            if not present:
                fetch.run(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _too_small(versions, wanted.size_bytes) from error
        raise ReplicationFailed(name=wanted.name, reason=f"{error}") from error
    return {
        "digest": wanted.digest,
        "path": str(folder),
        "num_files": len(wanted.files),
        "size_bytes": wanted.size_bytes,
        "fetched_bytes": fetch.fetched_bytes,
        "present": present,
    }


class _Fetch:
    """One process's work on one version, under its lock."""

    def __init__(
        self,
        manifest: Manifest,
        stores: Iterable[PayloadStore],
        progress: Progress,
        nearer: Nearer | None,
    ) -> None:
        self.fetched_bytes = 0
        self._nearer = nearer
        self._manifest = manifest
        self._stores = tuple(stores)
        self._progress = progress
        self._buffer = memoryview(bytearray(CHUNK_BYTES))

    def run(self, folder: Path) -> None:
        # Only a manifest of the same files goes on with what an earlier one has left.
        partial = folder.with_name(f".{folder.name}-{self._manifest.fingerprint[:16]}")
        if folder.exists():  # it is not whole
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)
        partial.mkdir(mode=0o700, exist_ok=True)
        self._check_disk(partial)
        done_bytes = 0
        for file in self._manifest.files:
            self._bring(file, partial / file.path, done_bytes)
            done_bytes += file.size_bytes
        with (partial / MANIFEST_FILE).open("w") as written:
            written.write(self._manifest.model_dump_json(indent=2))
            _flush(written)
        partial.rename(folder)

    def _check_disk(self, partial: Path) -> None:
        needed_bytes = sum(
            file.size_bytes - max(0, _size_bytes(partial / file.path))
            for file in self._manifest.files
        )
        if needed_bytes > 0 and needed_bytes + SPARE_BYTES > shutil.disk_usage(partial).free:
            raise _too_small(partial.parent, needed_bytes)

    def _bring(self, file: FileSource, path: Path, done_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        num_failed = 0
        while (actual := self._copy(file, path, done_bytes)) != file.digest:
            path.unlink()
            if self._nearer is not None and self._nearer.distrust(file):
                continue
            num_failed += 1
            if num_failed == NUM_TRIES:
                name = f"{self._manifest.name}/{file.path}"
                raise DigestMismatch(name=name, expected=file.digest, actual=actual)

    def _copy(self, file: FileSource, path: Path, done_bytes: int) -> str:
        """Write what is missing of a file; return the digest of all of it."""
        hasher = _get_hasher(file)
        at = 0

        def moved(source: io.BufferedIOBase, limit_bytes: int) -> Iterator[memoryview]:
            nonlocal at
            while at < limit_bytes:
                num_bytes = source.readinto(self._buffer[: limit_bytes - at])
                if not num_bytes:
                    return
                chunk = self._buffer[:num_bytes]
                hasher.update(chunk)
                at += num_bytes
                self._progress(done_bytes + at, self._manifest.size_bytes)
                yield chunk

        with path.open("a+b") as written:
            if os.fstat(written.fileno()).st_size > file.size_bytes:
                written.truncate(0)
            written.seek(0)
            for _ in moved(written, file.size_bytes):
                pass
            while at < file.size_bytes:
                near = self._nearer.open(file, at) if self._nearer is not None else None
                with near or self._open(file) as source:
                    if near is None:
                        source.seek(at)
                    for chunk in moved(source, file.size_bytes):
                        written.write(chunk)
                        self.fetched_bytes += len(chunk)
                if near is None:
                    break
            _flush(written)
        return f"{file.digest.partition(':')[0]}:{hasher.hexdigest()}"

    def _open(self, file: FileSource) -> io.BufferedIOBase:
        """Return the source of a file, which has the size that is declared."""
        if isinstance(file.source, Reference):
            data = unpack({"$ref": file.source.model_dump(mode="json")}, self._stores)
            if not isinstance(data, bytes):
                raise PayloadInvalid(what=f"The source of {file.path!r}", reason="it is not bytes")
            size_bytes = len(data)
            source: io.BufferedIOBase = io.BytesIO(data)
        else:
            path = Path(file.source)
            if not path.is_file():  # nor a pipe, which would never end
                raise ReplicationFailed(name=self._manifest.name, reason=f"{path} is not a file")
            size_bytes = path.stat().st_size
            source = path.open("rb")
        if size_bytes != file.size_bytes:
            source.close()
            raise DigestMismatch(
                name=f"{self._manifest.name}/{file.path}",
                expected=f"{file.digest} ({file.size_bytes} bytes)",
                actual=f"that of {size_bytes} bytes",
            )
        return source


def _is_whole(folder: Path, wanted: Manifest) -> bool:
    """Return whether a version is there, by the sizes of its files."""
    try:
        there = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    if there.fingerprint != wanted.fingerprint:
        raise ManifestInvalid(
            where="digest", reason=f"{folder} holds other files under the same digest"
        )
    return all(_size_bytes(folder / file.path) == file.size_bytes for file in wanted.files)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _get_hasher(file: FileSource) -> Hasher:
    if file.sha256:
        return hashlib.sha256()
    try:
        from blake3 import blake3
    except ImportError as error:
        raise ReplicationFailed(name=file.path, reason="blake3 is not installed here") from error
    return blake3()


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with its process; wait for whoever has it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _too_small(path: Path, needed_bytes: int) -> DiskTooSmall:
    return DiskTooSmall(
        path=str(path), needed_bytes=needed_bytes, free_bytes=shutil.disk_usage(path).free
    )
