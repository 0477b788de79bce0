"""Projects, keys, groups, users and tickets as those see them who manage them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from fabric.auth.identity import Identity
from fabric.errors import RequestInvalid

MAX_CONCURRENT = 10**6


def check_concurrent(number: int) -> None:
    """Check how many requests a key or a group may have in flight.

    Raises:
        RequestInvalid: The number is not positive, or over ``MAX_CONCURRENT``.
    """
    if not 1 <= number <= MAX_CONCURRENT:
        reason = f"it is from 1 to {MAX_CONCURRENT}"
        raise RequestInvalid(param="max_concurrent", value=number, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectRecord:
    """Who owns allocations, keys and runs; where ``sites`` are named, its data stays there."""

    name: str
    title: str
    created_at: datetime
    sites: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """What the members of a Globus group may do in a project, and how much of it at once."""

    group_id: str
    project: str
    scopes: frozenset[str]
    max_concurrent: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRecord:
    """What one person may do in a project beside what groups say; ``user`` is a username or an
    identity's UUID."""

    user: str
    project: str
    scopes: frozenset[str]
    max_concurrent: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedUser:
    """One who is kept out of the hub, and why."""

    user: str
    reason: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a caller may do in a project, and how much of it at once."""

    project: str
    scopes: frozenset[str]
    max_concurrent: int


def add_up(records: Iterable[GroupRecord | UserRecord]) -> dict[str, Membership]:
    """Return what all these together allow in each project: scopes add up, and the largest of the
    limits holds."""
    found: dict[str, Membership] = {}
    for one in records:
        new = Membership(project=one.project, scopes=one.scopes, max_concurrent=one.max_concurrent)
        old = found.get(one.project, new)
        found[one.project] = replace(
            old,
            scopes=old.scopes | new.scopes,
            max_concurrent=max(old.max_concurrent, new.max_concurrent),
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketRecord:
    """A ticket without its secret.

    ``max_usu`` is the most all its calls together may cost; ``scopes`` are what its issuer may do
    inside a forward pass, and so may its calls.
    """

    id: str
    project: str
    issued_by: str
    site: str
    max_usu: int | None
    max_concurrent: int
    scopes: frozenset[str] = frozenset()
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None

    def identity(self) -> Identity:
        """Who calls with it: the key it was issued to, for raw calls at the site alone."""
        return Identity(
            key_id=self.issued_by,
            project=self.project,
            scopes=self.scopes | {"ticket"},
            max_concurrent=self.max_concurrent,
            site=self.site,
        )
