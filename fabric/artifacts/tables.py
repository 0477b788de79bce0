"""The table of artifacts."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Table, Text

from fabric.sql import UtcTime, metadata

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("run", Text),
    Column("part", Text),
    Column("sha256", Text, nullable=False, index=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
)
