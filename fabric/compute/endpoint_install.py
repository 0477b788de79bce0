"""Puts an endpoint's files where Globus Compute looks for them, and overwrites nobody's edits."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fabric.config import ComputeExecutor, SiteSpec
from fabric.errors import FilesForeign, PackageMissing, SettingInvalid

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MANIFEST = ".fabric.json"
"""Beside the files: the digests of everything that was ever installed under each name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A file to write: its text, what is there now, and whether somebody else wrote that."""

    name: str
    text: str
    before: str | None
    foreign: bool

    def diff(self) -> str:
        """Return the difference, as ``diff -u`` prints it; empty when there is none."""
        lines = difflib.unified_diff(
            (self.before or "").splitlines(keepends=True),
            self.text.splitlines(keepends=True),
            self.name if self.before is not None else "/dev/null",
            self.name,
        )
        return "".join(lines)


def get_endpoint_directory(name: str) -> Path:
    """Return where Globus Compute keeps the endpoint ``name`` of this user.

    Raises:
        SettingInvalid: The name is not one that an endpoint may have.
        PackageMissing: Globus Compute is not installed here.
    """
    if not _NAME.fullmatch(name):
        raise SettingInvalid(
            setting="--name",
            value=name,
            reason="an endpoint's name has letters, digits and . _ - only, at most 64 of them",
        )
    try:
        from globus_compute_sdk.sdk.compute_dir import get_compute_dir
    except ModuleNotFoundError as error:
        raise PackageMissing(package="globus-compute-sdk", extra="site") from error
    return Path(get_compute_dir()) / name


def plan_install(directory: Path, files: Mapping[str, str]) -> list[Change]:
    """Return what installing ``files`` would change; empty when everything is there already.

    Raises:
        SettingInvalid: The directory cannot be read.
    """
    with _reported(directory):
        ours = _read_manifest(directory)
        changes = []
        for name, text in files.items():
            path = directory / name
            before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
            if before != text:
                foreign = before is not None and _digest(before) not in ours.get(name, [])
                changes.append(Change(name=name, text=text, before=before, foreign=foreign))
        return changes


def install(directory: Path, files: Mapping[str, str], *, force: bool = False) -> list[Change]:
    """Write an endpoint's files, each as a whole; what they replace stays as ``NAME.bak``.

    Args:
        directory: The endpoint's; made if need be, for its owner only.
        files: Name to text.
        force: Replace files that somebody else wrote or changed.

    Returns:
        What was written.

    Raises:
        FilesForeign: Somebody else's files are in the way; nothing was written.
        SettingInvalid: The directory cannot be written.
    """
    with _reported(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory):
            changes = plan_install(directory, files)
            foreign = [change.name for change in changes if change.foreign]
            if foreign and not force:
                raise FilesForeign(directory=str(directory), files=foreign)
            # The digests come first: an install that is cut off leaves only files known as ours.
            manifest = _read_manifest(directory)
            for change in changes:
                known = manifest.setdefault(change.name, [])
                known.append(_digest(change.text))
            if changes:
                _write(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            for change in changes:
                if change.before is not None:
                    _write(directory / f"{change.name}.bak", change.before)
                _write(directory / change.name, change.text)
            return changes


def read_endpoint_id(directory: Path, site: SiteSpec) -> UUID | None:
    """Return the id the endpoint was given when it first started, or ``None`` before that.

    Raises:
        SettingInvalid: It is not the one in the site's file.
    """
    path = directory / "endpoint.json"
    if not path.exists():
        return None
    with _reported(directory):
        found = UUID(json.loads(path.read_text(encoding="utf-8"))["endpoint_id"])
    if isinstance(site.executor, ComputeExecutor) and site.executor.endpoint_id != found:
        raise SettingInvalid(
            setting="executor.endpoint_id",
            value=str(site.executor.endpoint_id),
            reason=f"the endpoint in {directory} is {found}; correct the site's file, or choose"
            " another --name",
            source=f"the file of {site.name}",
        )
    return found


def _read_manifest(directory: Path) -> dict[str, list[str]]:
    path = directory / MANIFEST
    if not path.exists():
        return {}
    manifest: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _reported(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise SettingInvalid(
            setting="endpoint directory", value=str(directory), reason=f"{error}"
        ) from error
