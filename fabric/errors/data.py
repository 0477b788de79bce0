"""Versions that are not what they should be."""

from __future__ import annotations

from fabric.errors.base import FabricError


class VersionError(FabricError):
    """A model version is missing, damaged or not what was asked for."""

    code = "version_error"
    http_status = 409


class DigestMismatch(VersionError):
    """Bytes do not have the digest they were asked by."""

    code = "digest_mismatch"

    def __init__(self, *, name: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{name!r} has the digest {actual} where {expected} was expected; it is refused. Fetch"
            " it again, or register this version under a revision of its own.",
            name=name,
            expected=expected,
            actual=actual,
        )


class FunctionDrifted(VersionError):
    """What is registered under a function's id is not what this release ships."""

    code = "function_drifted"

    def __init__(self, *, name: str, id: str, registered: str, shipped: str) -> None:
        super().__init__(
            f"The function {name!r} is registered as {id} with the source {registered}, and this"
            f" release ships {shipped}; register it again with `fabric-admin function register"
            f" {name}` and allow the new id at the endpoints.",
            name=name,
            id=id,
            registered=registered,
            shipped=shipped,
        )


class ManifestInvalid(VersionError):
    """A manifest of files cannot be followed."""

    code = "manifest_invalid"
    http_status = 400

    def __init__(self, *, where: str, reason: str) -> None:
        super().__init__(
            f"The manifest of files is refused at {where}: {reason}.", where=where, reason=reason
        )


class ReplicationFailed(VersionError):
    """A file of a version could not be read or written; what was fetched is kept."""

    code = "replication_failed"
    http_status = 502
    retryable = True

    def __init__(self, *, name: str, reason: str) -> None:
        super().__init__(
            f"{name!r} could not be replicated: {reason}. What was fetched is kept: put that right"
            " and ask again.",
            name=name,
            reason=reason,
        )


class DiskTooSmall(VersionError):
    """The files of a version do not fit the disk they are for."""

    code = "disk_too_small"
    http_status = 507

    def __init__(self, *, path: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{needed_bytes} more bytes are needed under {path} and {free_bytes} are free; make"
            " room, or choose another run_dir.",
            path=path,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )
