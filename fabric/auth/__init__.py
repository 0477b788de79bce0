"""Who calls, and what they may do: projects and API keys."""

from fabric.auth.identity import SCOPES, Identity, require, require_site
from fabric.auth.keys import Keys
from fabric.auth.records import KeyRecord, ProjectRecord

__all__ = [
    "SCOPES",
    "Identity",
    "KeyRecord",
    "Keys",
    "ProjectRecord",
    "require",
    "require_site",
]
