"""Artifacts that cannot be kept."""

from __future__ import annotations

from fabric.errors.admission import AdmissionError


class ArtifactsFull(AdmissionError):
    """A project's artifacts take as much room as they may."""

    code = "artifacts_full"
    http_status = 413

    def __init__(self, *, num_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"The project's artifacts may take {limit_bytes} bytes together and would take"
            f" {num_bytes}; delete some, or wait until they expire.",
            num_bytes=num_bytes,
            limit_bytes=limit_bytes,
        )
