"""The tables of projects, keys, groups and tickets."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Integer, Table, Text

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

project_groups = Table(
    "project_groups",
    metadata,
    Column("group_id", Text, primary_key=True),
    Column(
        "project", ForeignKey("projects.name", ondelete="CASCADE"), primary_key=True, index=True
    ),
    Column("scopes", Text, nullable=False),
    Column("max_concurrent", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    CheckConstraint("max_concurrent > 0", name="max_concurrent_positive"),
)

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
