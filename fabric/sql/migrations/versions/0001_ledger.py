"""Accounts, allocations, the journal, holds and rates."""

import sqlalchemy as sa
from alembic import op

revision = "0001_ledger"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""

_IMMUTABLE = ("journal", "entries")


def _forbid_changes(table: str) -> None:
    message = f"rows of {table} are never changed"
    if op.get_bind().dialect.name == "sqlite":
        for change in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change} BEFORE {change} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, '{message}'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_unchanged() RETURNS trigger LANGUAGE plpgsql"
        f" AS $$ BEGIN RAISE restrict_violation USING MESSAGE = '{message}'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_unchanged BEFORE UPDATE OR DELETE ON {table}"
        f" FOR EACH ROW EXECUTE FUNCTION {table}_unchanged()"
    )


def _allow_changes(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        return
    op.execute(f"DROP FUNCTION {table}_unchanged() CASCADE")


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("balance_usu", sa.BigInteger(), nullable=False),
        sa.Column("may_go_negative", sa.Boolean(), nullable=False),
        sa.CheckConstraint("balance_usu >= 0 OR may_go_negative", name="ck_accounts_not_negative"),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
        sa.UniqueConstraint("name", name="uq_accounts_name"),
    )

    op.create_table(
        "allocations",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("account_id", _ID, nullable=False),
        sa.Column("held_account_id", _ID, nullable=False),
        sa.Column("starts_at", _TIME),
        sa.Column("ends_at", _TIME),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name="fk_allocations_account_id_accounts"
        ),
        sa.ForeignKeyConstraint(
            ["held_account_id"], ["accounts.id"], name="fk_allocations_held_account_id_accounts"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_allocations"),
        sa.UniqueConstraint("name", name="uq_allocations_name"),
    )
    op.create_index("ix_allocations_project", "allocations", ["project"])

    op.create_table(
        "journal",
        sa.Column("id", _ID, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("allocation_id", _ID, nullable=False),
        sa.Column("hold_id", sa.Text()),
        sa.Column("site", sa.Text()),
        sa.Column("model", sa.Text()),
        sa.Column("memo", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["allocation_id"], ["allocations.id"], name="fk_journal_allocation_id_allocations"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_journal"),
    )
    op.create_index("ix_journal_allocation_id_id", "journal", ["allocation_id", "id"])

    op.create_table(
        "entries",
        sa.Column("journal_id", _ID, nullable=False),
        sa.Column("account_id", _ID, nullable=False),
        sa.Column("amount_usu", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name="fk_entries_account_id_accounts"
        ),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal.id"], name="fk_entries_journal_id_journal"
        ),
        sa.PrimaryKeyConstraint("journal_id", "account_id", name="pk_entries"),
    )

    op.create_table(
        "holds",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("allocation_id", _ID, nullable=False),
        sa.Column("amount_usu", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("lease_expires_at", _TIME, nullable=False),
        sa.Column("charged_usu", sa.BigInteger()),
        sa.Column("site", sa.Text()),
        sa.Column("closed_at", _TIME),
        sa.CheckConstraint("amount_usu >= 0", name="ck_holds_amount_not_negative"),
        sa.CheckConstraint(
            "charged_usu BETWEEN 0 AND amount_usu", name="ck_holds_charge_within_hold"
        ),
        sa.ForeignKeyConstraint(
            ["allocation_id"], ["allocations.id"], name="fk_holds_allocation_id_allocations"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_holds"),
    )
    op.create_index("ix_holds_state_lease_expires_at", "holds", ["state", "lease_expires_at"])

    op.create_table(
        "rates",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("effective_from", _TIME, nullable=False),
        sa.Column("prompt_usu_per_mtoken", sa.BigInteger(), nullable=False),
        sa.Column("cached_prompt_usu_per_mtoken", sa.BigInteger(), nullable=False),
        sa.Column("output_usu_per_mtoken", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "site", "effective_from", name="pk_rates"),
    )

    for table in _IMMUTABLE:
        _forbid_changes(table)


def downgrade() -> None:
    for table in _IMMUTABLE:
        _allow_changes(table)
    op.drop_table("rates")
    op.drop_table("holds")
    op.drop_table("entries")
    op.drop_table("journal")
    op.drop_table("allocations")
    op.drop_table("accounts")
