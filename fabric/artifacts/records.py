"""What is known of an artifact, and the limits artifacts keep."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactSettings:
    """How artifacts are kept.

    Args:
        file_bytes: The largest one.
        project_bytes: What those of one project may take together.
        ttl_s: How long one is kept.
        sweep_s: How often what has expired is removed.
    """

    file_bytes: int = 2**30
    project_bytes: int = 4 * 2**30
    ttl_s: float = 86_400.0
    sweep_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRecord:
    """One safetensors file of a project.

    ``run`` and ``part`` say which run of the fabric, and which run of its program, saved it; an
    uploaded one has neither.
    """

    id: str
    project: str
    run: str | None
    part: str | None
    sha256: str
    num_bytes: int
    created_at: datetime
    expires_at: datetime
