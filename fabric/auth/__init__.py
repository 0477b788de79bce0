"""Who calls, and what they may do: projects, API keys, Globus logins, tickets."""

from fabric.auth.authenticator import Authenticator
from fabric.auth.globus import GlobusTokens
from fabric.auth.groups import GROUP_SCOPES, Groups
from fabric.auth.identity import PROGRAM_SCOPES, SCOPES, Identity, require, require_site
from fabric.auth.keys import Keys
from fabric.auth.records import GroupRecord, KeyRecord, ProjectRecord, TicketRecord
from fabric.auth.tickets import Tickets

__all__ = [
    "GROUP_SCOPES",
    "PROGRAM_SCOPES",
    "SCOPES",
    "Authenticator",
    "GlobusTokens",
    "GroupRecord",
    "Groups",
    "Identity",
    "KeyRecord",
    "Keys",
    "ProjectRecord",
    "TicketRecord",
    "Tickets",
    "require",
    "require_site",
]
