"""Who calls, and what they may do: projects, keys, users, tickets, grants, limits, tiers."""

from fabric.auth.authenticator import Authenticator
from fabric.auth.decide import ANY, MODES, TIERS, Decision, Grant, Permits, get_modes
from fabric.auth.globus import GlobusTokens
from fabric.auth.grants import Grants
from fabric.auth.groups import GROUP_SCOPES, Groups
from fabric.auth.identity import PROGRAM_SCOPES, SCOPES, Identity, require, require_site
from fabric.auth.keys import Keys
from fabric.auth.records import (
    BlockedUser,
    GroupRecord,
    KeyRecord,
    ProjectRecord,
    TicketRecord,
    UserRecord,
)
from fabric.auth.rules import Limit, Rulebook, Rules, TierTerms
from fabric.auth.tickets import Tickets
from fabric.auth.tiers import Tiers
from fabric.auth.users import GLOBUS, Users, parse_user

__all__ = [
    "ANY",
    "GLOBUS",
    "GROUP_SCOPES",
    "MODES",
    "PROGRAM_SCOPES",
    "SCOPES",
    "TIERS",
    "Authenticator",
    "BlockedUser",
    "Decision",
    "GlobusTokens",
    "Grant",
    "Grants",
    "GroupRecord",
    "Groups",
    "Identity",
    "KeyRecord",
    "Keys",
    "Limit",
    "Permits",
    "ProjectRecord",
    "Rulebook",
    "Rules",
    "TicketRecord",
    "Tickets",
    "TierTerms",
    "Tiers",
    "UserRecord",
    "Users",
    "get_modes",
    "parse_user",
    "require",
    "require_site",
]
