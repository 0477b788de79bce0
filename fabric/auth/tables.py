"""The tables of projects, keys, groups, users, tickets, grants, limits and tiers."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Integer,
    Table,
    Text,
    UniqueConstraint,
)

from fabric.sql import UtcTime, metadata

projects = Table(
    "projects",
    metadata,
    Column("name", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("label", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("site", Text),
    Column("max_concurrent", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    CheckConstraint("max_concurrent > 0", name="max_concurrent_positive"),
)


def _members(name: str, who: str) -> Table:
    """Return a table of who may do what in a project."""
    project = ForeignKey("projects.name", ondelete="CASCADE")
    return Table(
        name,
        metadata,
        Column(who, Text, primary_key=True),
        Column("project", project, primary_key=True, index=True),
        Column("scopes", Text, nullable=False),
        Column("max_concurrent", Integer, nullable=False),
        Column("created_at", UtcTime, nullable=False),
        CheckConstraint("max_concurrent > 0", name="max_concurrent_positive"),
    )


project_groups = _members("project_groups", "group_id")
project_users = _members("project_users", "user")

project_sites = Table(
    "project_sites",
    metadata,
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), primary_key=True),
    Column("site", Text, primary_key=True),
)
"""Where the requests of a project may run; one without a row may anywhere."""

blocked_users = Table(
    "blocked_users",
    metadata,
    Column("user", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

logins = Table(
    "logins",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, index=True),
)
"""The usernames of identities that have logged in."""

tickets = Table(
    "tickets",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("issued_by", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("max_usu", BigInteger),
    Column("max_concurrent", Integer, nullable=False),
    Column("scopes", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("revoked_at", UtcTime),
)

grants = Table(
    "grants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("subject", Text, nullable=False, index=True),
    # What is left out is the empty string, so that the constraint sees it.
    Column("model", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("modes", Text, nullable=False),
    Column("tiers", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("subject", "model", "site"),
)

private_objects = Table(
    "private_objects",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("created_at", UtcTime, nullable=False),
)

limits = Table(
    "limits",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("requests_per_min", BigInteger),
    Column("tokens_per_min", BigInteger),
    Column("max_concurrent", BigInteger),
    Column("created_at", UtcTime, nullable=False),
    CheckConstraint("requests_per_min > 0", name="requests_per_min_positive"),
    CheckConstraint("tokens_per_min > 0", name="tokens_per_min_positive"),
    CheckConstraint("max_concurrent > 0", name="max_concurrent_positive"),
)

access_version = Table(
    "access_version",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
)
"""One row: how often what callers may do has changed."""

tiers = Table(
    "tiers",
    metadata,
    Column("tier", Text, primary_key=True),
    Column("charge_factor_millionths", BigInteger),
    Column("weight", Float),
    Column("first_token_s", Float),
    Column("token_s", Float),
    Column("share_in_time", Float),
    Column("share_answered", Float),
    CheckConstraint("charge_factor_millionths > 0", name="charge_factor_millionths_positive"),
    CheckConstraint("weight > 0", name="weight_positive"),
    CheckConstraint("first_token_s > 0", name="first_token_s_positive"),
    CheckConstraint("token_s > 0", name="token_s_positive"),
    CheckConstraint("share_in_time > 0 AND share_in_time < 1", name="share_in_time_part"),
    CheckConstraint("share_answered > 0 AND share_answered < 1", name="share_answered_part"),
)
"""What is not null is as administrators changed it."""
