"""What machines charge for jobs that users bring."""

import sqlalchemy as sa
from alembic import op

revision = "0010_job_charges"
down_revision = "0009_adapters"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "job_charges",
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("launch", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("journal_id", _ID, nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("account", sa.Text()),
        sa.Column("num_nodes", sa.Integer(), nullable=False),
        sa.Column("elapsed_s", sa.Float(), nullable=False),
        sa.Column("charge_millionths", sa.BigInteger(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal.id"], name="fk_job_charges_journal_id_journal"
        ),
        sa.PrimaryKeyConstraint("project", "launch", "job_id", name="pk_job_charges"),
        sa.UniqueConstraint("journal_id", name="uq_job_charges_journal_id"),
    )


def downgrade() -> None:
    op.drop_table("job_charges")
