"""Programs, payloads and versions that are not what they should be."""

from __future__ import annotations

from fabric.errors.base import FabricError


class ProgramError(FabricError):
    """An intervention program is not valid or cannot be run here."""

    code = "program_error"
    http_status = 400


class PayloadError(FabricError):
    """A tensor or an object on the wire is not what it declares to be."""

    code = "payload_error"
    http_status = 400


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
