"""The log of what administrators did."""

from __future__ import annotations

from fabric.errors.base import FabricError


class AuditBroken(FabricError):
    """An entry of the log is not what was written, or is missing."""

    code = "audit_broken"

    def __init__(self, *, seq: int, reason: str) -> None:
        super().__init__(
            f"The audit log was changed at entry {seq}: {reason}. Compare the database with its"
            " last backup.",
            seq=seq,
            reason=reason,
        )
