"""What is kept of an adapter besides its contents."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """Limits.

    Args:
        file_bytes: The largest adapter there may be.
        project_bytes: What the adapters of one project may take together.
        project_adapters: How many one project may have.
    """

    file_bytes: int = 512 * 2**20
    project_bytes: int = 4 * 2**30
    project_adapters: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """An adapter of a project.

    Args:
        project: Whose it is; nobody else sees it.
        name: What the project calls it.
        model: The version it was made for, as ``name@revision``.
        digest: Of its contents.
        num_bytes: Of its contents.
        rank: The largest of its layers.
        num_layers: How many layers it changes.
        created_at: When it was uploaded (UTC).
    """

    project: str
    name: str
    model: str
    digest: str
    num_bytes: int
    rank: int
    num_layers: int
    created_at: datetime
