"""What a model version consists of: files, what they hash to, and where their bytes are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from fabric.errors import ManifestInvalid
from fabric.messages.wire import Wire
from fabric.payloads.store import Reference

MANIFEST_FILE = ".manifest.json"


class FileSource(Wire):
    """A file of a version, and where its bytes are: a path all sites mount, or a stored payload.

    ``path`` is where it goes, relative to the version's folder. A ``Reference`` leads to bytes.
    """

    path: str = Field(min_length=1, max_length=1024)
    size_bytes: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    blake3: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    source: str | Reference

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in path or "\\" in path:
            raise ValueError("a path is relative, with / between names, and has no . or ..")
        if parts[0] == MANIFEST_FILE:
            raise ValueError(f"{MANIFEST_FILE} is the manifest's own name")
        return path

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str | Reference) -> str | Reference:
        if isinstance(source, str) and (not source.startswith("/") or "\0" in source):
            raise ValueError("a source is an absolute path or a reference; no address is fetched")
        return source

    @model_validator(mode="after")
    def _one_digest(self) -> FileSource:
        if (self.sha256 is None) == (self.blake3 is None):
            raise ValueError("a file has either a sha256 or a blake3")
        return self

    @property
    def digest(self) -> str:
        """The digest with its kind before it."""
        return f"sha256:{self.sha256}" if self.sha256 else f"blake3:{self.blake3}"


class Manifest(Wire):
    """What a version consists of."""

    name: str = Field(min_length=1, max_length=128)
    revision: str = Field(min_length=1, max_length=128)
    digest: str = Field(pattern=r"^(sha256|blake3):[0-9a-f]{64}$")
    files: tuple[FileSource, ...] = Field(min_length=1, max_length=100_000)

    @model_validator(mode="after")
    def _no_clash(self) -> Manifest:
        paths = [file.path for file in self.files]
        folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        if len({*paths}) != len(paths) or not folders.isdisjoint(paths):
            raise ValueError("two files have the same path, or one is a folder of another")
        return self

    @property
    def size_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """A digest of what the files are, wherever they come from."""
        files = sorted((file.path, file.size_bytes, file.digest) for file in self.files)
        return hashlib.sha256(repr(files).encode()).hexdigest()


def get_manifest(fields: Mapping[str, Any]) -> Manifest:
    """Return a manifest that came as JSON.

    Raises:
        ManifestInvalid: It is malformed, or leads out of its folder.
    """
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ManifestInvalid(
            where=".".join(map(str, first["loc"])) or "files", reason=first["msg"]
        ) from error
