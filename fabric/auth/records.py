"""Projects and keys as administrators see them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectRecord:
    """Who owns allocations, keys and runs."""

    name: str
    title: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key without its secret, of which only a hash is kept."""

    id: str
    project: str
    label: str
    scopes: frozenset[str]
    site: str | None
    max_concurrent: int
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
