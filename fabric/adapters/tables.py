"""The table of adapters."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, Table, Text

from fabric.sql import UtcTime, metadata

adapters = Table(
    "adapters",
    metadata,
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("digest", Text, nullable=False, index=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("num_layers", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)
