"""Periods and shares of allocations, entries with names, units, and prices of what is kept."""

import sqlalchemy as sa
from alembic import op

revision = "0012_accounts"
down_revision = "0011_access"
branch_labels = None
depends_on = None

_PRICES = (
    "kv_block_usu_per_million_s",
    "adapter_usu_per_million_h",
    "fine_tune_usu_per_million_s",
    "stored_usu_per_million_gib_day",
)


def upgrade() -> None:
    op.add_column("allocations", sa.Column("period", sa.Text()))
    op.add_column("allocations", sa.Column("holder", sa.Text()))
    op.add_column("allocations", sa.Column("parent_id", sa.BigInteger()))
    op.create_index("ix_allocations_parent_id", "allocations", ["parent_id"])
    op.add_column("journal", sa.Column("source_id", sa.BigInteger()))
    op.add_column("journal", sa.Column("mends_id", sa.BigInteger()))
    op.add_column("journal", sa.Column("key", sa.Text()))
    op.create_index("ix_journal_source_id", "journal", ["source_id"])
    op.create_index("ix_journal_mends_id", "journal", ["mends_id"])
    op.create_index("ix_journal_hold_id", "journal", ["hold_id"])
    op.create_index("ix_journal_key", "journal", ["key"], unique=True)
    for name in _PRICES:
        column = sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")
        op.add_column("rates", column)
    kept = sa.Column("kv_block_s", sa.Float(), nullable=False, server_default="0")
    op.add_column("runs", kept)
    op.create_table(
        "units",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("effective_from", sa.BigInteger(), nullable=False),
        sa.Column("usu_per_million", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "effective_from", name="pk_units"),
    )
    op.create_table(
        "reconciled_jobs",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("charge_usu", sa.BigInteger(), nullable=False),
        sa.Column("billed_usu", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("site", "job", name="pk_reconciled_jobs"),
    )


def downgrade() -> None:
    op.drop_table("reconciled_jobs")
    op.drop_table("units")
    op.drop_column("runs", "kv_block_s")
    for name in reversed(_PRICES):
        op.drop_column("rates", name)
    for name in ("key", "hold_id", "mends_id", "source_id"):
        op.drop_index(f"ix_journal_{name}", "journal")
    for name in ("key", "mends_id", "source_id"):
        op.drop_column("journal", name)
    op.drop_index("ix_allocations_parent_id", "allocations")
    for name in ("parent_id", "holder", "period"):
        op.drop_column("allocations", name)
