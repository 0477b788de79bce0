"""The tables of files and batches. A line's request stays in the input file: here is its place."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Float, ForeignKey, Index, Integer, Table, Text

from fabric.sql import UtcTime, metadata

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Index(None, "project", "created_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", ForeignKey("projects.name", ondelete="CASCADE"), nullable=False),
    Column("key_id", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file", Text, nullable=False),
    Column("output_file", Text),
    Column("error_file", Text),
    Column("output_ttl_s", Float, nullable=False),
    Column("model", Text),
    Column("metadata", JSON, nullable=False),
    Column("status", Text, nullable=False),
    Column("errors", JSON, nullable=False),
    Column("num_lines", Integer, nullable=False),
    Column("num_completed", Integer, nullable=False),
    Column("num_failed", Integer, nullable=False),
    Column("charge_usu", BigInteger, nullable=False),
    Column("life", Integer, nullable=False),
    Column("runner", Text),
    Column("lease_expires_at", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Column("in_progress_at", UtcTime),
    Column("cancelling_at", UtcTime),
    Column("finalizing_at", UtcTime),
    Column("ended_at", UtcTime, index=True),
    Column("expires_at", UtcTime, nullable=False),
    Index(None, "project", "created_at"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch", ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", Text, nullable=False),
    Column("offset_bytes", BigInteger, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("result", Text),
)
