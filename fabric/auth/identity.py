"""An identified caller and the check of what it may do."""

from __future__ import annotations

from dataclasses import dataclass

from fabric.errors import PermissionDenied

SCOPES = frozenset({"query", "admin", "site"})
"""``query``: send requests, explain them, read the project's runs. ``admin``: change the catalog,
keys and accounts. ``site``: as one site's agent, ask for launches there. None implies another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller, as its key says; ``site`` is what a site agent is bound to."""

    key_id: str
    project: str
    scopes: frozenset[str]
    max_concurrent: int
    site: str | None = None


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
