"""The ledger's tables. An amount is integer micro-SU; a sign is given to it by its account alone.

``accounts.balance_usu`` is a cache of the sum of an account's entries, written in the transaction
that writes the entries; ``fabric.ledger.audit`` recomputes it. Entries and journal rows are never
changed: triggers made by the migration refuse it. ``parent_id``, ``source_id`` and ``mends_id`` are
ids of rows that are never deleted; SQLite could not take back a column with a constraint.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
)

from fabric.sql import UtcTime, metadata

_Id = BigInteger().with_variant(Integer, "sqlite")

accounts = Table(
    "accounts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("balance_usu", BigInteger, nullable=False),
    Column("may_go_negative", Boolean, nullable=False),
    CheckConstraint("balance_usu >= 0 OR may_go_negative", name="not_negative"),
)

allocations = Table(
    "allocations",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("project", Text, nullable=False, index=True),
    Column("site", Text, nullable=False),
    Column("period", Text),
    Column("holder", Text),
    Column("parent_id", BigInteger, index=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("held_account_id", ForeignKey("accounts.id"), nullable=False),
    Column("starts_at", UtcTime),
    Column("ends_at", UtcTime),
)

journal = Table(
    "journal",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("kind", Text, nullable=False),
    Column("allocation_id", ForeignKey("allocations.id"), nullable=False),
    Column("source_id", BigInteger, index=True),
    Column("hold_id", Text, index=True),
    Column("mends_id", BigInteger, index=True),
    Column("key", Text, index=True, unique=True),
    Column("site", Text),
    Column("model", Text),
    Column("memo", Text, nullable=False),
    Index(None, "allocation_id", "id"),
)

entries = Table(
    "entries",
    metadata,
    Column("journal_id", ForeignKey("journal.id"), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("amount_usu", BigInteger, nullable=False),
)

holds = Table(
    "holds",
    metadata,
    Column("id", Text, primary_key=True),
    Column("allocation_id", ForeignKey("allocations.id"), nullable=False),
    Column("amount_usu", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("lease_expires_at", UtcTime, nullable=False),
    Column("charged_usu", BigInteger),
    Column("site", Text),
    Column("closed_at", UtcTime),
    Index(None, "state", "lease_expires_at"),
    CheckConstraint("amount_usu >= 0", name="amount_not_negative"),
    CheckConstraint("charged_usu BETWEEN 0 AND amount_usu", name="charge_within_hold"),
)

job_charges = Table(
    "job_charges",
    metadata,
    Column("project", Text, primary_key=True),
    Column("launch", Text, primary_key=True),
    Column("job_id", Text, primary_key=True),
    Column("journal_id", ForeignKey("journal.id"), nullable=False, unique=True),
    Column("site", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("account", Text),
    Column("num_nodes", Integer, nullable=False),
    Column("elapsed_s", Float, nullable=False),
    Column("charge_millionths", BigInteger, nullable=False),
    Column("unit", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("ended_at", UtcTime, nullable=False),
)

rates = Table(
    "rates",
    metadata,
    Column("model", Text, primary_key=True),
    Column("site", Text, primary_key=True),
    Column("effective_from", UtcTime, primary_key=True),
    Column("prompt_usu_per_mtoken", BigInteger, nullable=False),
    Column("cached_prompt_usu_per_mtoken", BigInteger, nullable=False),
    Column("output_usu_per_mtoken", BigInteger, nullable=False),
    Column("hook_in_usu_per_mbyte", BigInteger, nullable=False, server_default="0"),
    Column("hook_out_usu_per_mbyte", BigInteger, nullable=False, server_default="0"),
    Column("device_usu_per_million_s", BigInteger, nullable=False, server_default="0"),
    Column("kv_block_usu_per_million_s", BigInteger, nullable=False, server_default="0"),
    Column("adapter_usu_per_million_h", BigInteger, nullable=False, server_default="0"),
    Column("fine_tune_usu_per_million_s", BigInteger, nullable=False, server_default="0"),
    Column("stored_usu_per_million_gib_day", BigInteger, nullable=False, server_default="0"),
)

units = Table(
    "units",
    metadata,
    Column("name", Text, primary_key=True),
    Column("effective_from", UtcTime, primary_key=True),
    Column("usu_per_million", BigInteger, nullable=False),
)

reconciled_jobs = Table(
    "reconciled_jobs",
    metadata,
    Column("site", Text, primary_key=True),
    Column("job", Text, primary_key=True),
    Column("charge_usu", BigInteger, nullable=False),
    Column("billed_usu", BigInteger, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime, nullable=False),
)
