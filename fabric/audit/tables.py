"""The table of the audit log. Its triggers, which refuse every change, are the migration's."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Table, Text

from fabric.sql import UtcTime, metadata

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", UtcTime, nullable=False),
    Column("who", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    Column("previous_sha256", Text, nullable=False),
    Column("sha256", Text, nullable=False),
)
