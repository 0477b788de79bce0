"""An identified caller and the check of what it may do."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from fabric.errors import PermissionDenied

PROGRAM_SCOPES = frozenset({"program:read", "program:write", "program:gradient", "program:weights"})
"""What intervention programs may do inside a forward pass: read it, write into it, take gradients,
read and overlay weights. Nobody has them who was not given them."""

SCOPES = PROGRAM_SCOPES | {"query", "admin", "site", "launch"}
"""``query``: send requests, explain them, read the project's runs. ``admin``: change the catalog,
keys and accounts. ``site``: as one site's agent, ask for launches there. ``launch``: bring
instances, in jobs that one's own allocation of a machine pays. None implies another. A ticket has a
scope of its own, ``ticket``, which no key can have and no route asks for, and those of
``PROGRAM_SCOPES`` that its issuer has."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A caller, as its key or its Globus login says.

    Attributes:
        key_id: The key's id, or ``globus:`` and the Globus identity's.
        project: Who is charged.
        scopes: What it may do.
        max_concurrent: How much of it at once.
        site: What a site agent is bound to.
        user: The Globus username; a key has none.
        projects: All projects that a Globus user may choose from.
        expires_at: When the credential ends.
        groups: The ids of all Globus groups of a login.
    """

    key_id: str
    project: str
    scopes: frozenset[str]
    max_concurrent: int
    site: str | None = None
    user: str | None = None
    projects: tuple[str, ...] = ()
    expires_at: datetime | None = None
    groups: frozenset[str] = frozenset()

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """Whose grants are the caller's, as ``Grant.subject`` names them."""
        kind, _, user = self.key_id.rpartition(":")
        who = [f"key:{user}"] if not kind else [f"user:{user}"]
        if self.user is not None:
            who.append(f"user:{self.user.lower()}")
        groups = [f"group:{group}" for group in sorted(self.groups)]
        return ("*", f"project:{self.project}", *who, *groups)


def require(identity: Identity, scope: str) -> None:
    """Refuse a caller without a permission.

    Raises:
        PermissionDenied: The key does not have the scope.
    """
    if scope not in identity.scopes:
        raise PermissionDenied(scope=scope)


def require_site(identity: Identity, site: str) -> None:
    """Refuse everyone but the agent of this site.

    Raises:
        PermissionDenied: The key is not a site's, or another site's.
    """
    require(identity, "site")
    if identity.site != site:
        raise PermissionDenied(scope=f"site:{site}")
