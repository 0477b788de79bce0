"""The catalog's tables. Runs name sites, models and keys without referring to their rows, so that
the record of a run outlives them."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
)

from fabric.sql import UtcTime, metadata

sites = Table(
    "sites",
    metadata,
    Column("name", Text, primary_key=True),
    Column("display", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("name", Text, nullable=False),
    Column("revision", Text, nullable=False),
    Column("digest", Text),
    Column("context_tokens", Integer, nullable=False),
    Column("dtype", Text),
    Column("source", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    UniqueConstraint("name", "revision"),
)

launches = Table(
    "launches",
    metadata,
    Column("instance", Text, primary_key=True),
    Column("site", ForeignKey("sites.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("digest", Text),
    Column("token_sha256", Text, nullable=False, unique=True),
    Column("state", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Column("ended_reason", Text),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("digest", Text),
    Column("adapter", Text),
    Column("site", Text),
    Column("instance", Text),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("hook_bytes_in", BigInteger, nullable=False, server_default="0"),
    Column("hook_bytes_out", BigInteger, nullable=False, server_default="0"),
    Column("queue_s", Float, nullable=False),
    Column("device_s", Float, nullable=False),
    Column("kv_block_s", Float, nullable=False, server_default="0"),
    Column("adapter_s", Float, nullable=False, server_default="0"),
    Column("charge_usu", BigInteger, nullable=False),
    Column("first_token_s", Float),
    Column("total_s", Float),
    Column("placement", Text),
    Column("error_code", Text),
    Column("program", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
    Index(None, "project", "created_at"),
)

functions = Table(
    "functions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, index=True),
    Column("sha256", Text, nullable=False),
    Column("fabric_version", Text, nullable=False),
    Column("visibility", Text, nullable=False),
    Column("group_id", Text),
    Column("endpoint_id", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("retired_at", UtcTime),
)

redemptions = Table(
    "redemptions",
    metadata,
    Column("run", Text, primary_key=True),
    Column("ticket", Text, nullable=False, index=True),
    Column("key_id", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("tier", Text, nullable=False),
    Column("prompt_tokens_bound", BigInteger, nullable=False),
    Column("max_output_tokens", BigInteger, nullable=False),
    Column("max_hook_bytes_in", BigInteger, nullable=False, server_default="0"),
    Column("max_hook_bytes_out", BigInteger, nullable=False, server_default="0"),
    Column("max_device_s", Float, nullable=False, server_default="0"),
    Column("program", Text),
    Column("held_usu", BigInteger, nullable=False),
    Column("charge_usu", BigInteger),
    Column("created_at", UtcTime, nullable=False),
    Column("due_at", UtcTime, nullable=False),
)
