"""Files, and the batches that read and write them."""

import sqlalchemy as sa
from alembic import op

revision = "0007_batches"
down_revision = "0006_tickets"
branch_labels = None
depends_on = None

_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project"], ["projects.name"], name="fk_files_project_projects", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_project_created_at", "files", ["project", "created_at"])

    op.create_table(
        "batches",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("input_file", sa.Text(), nullable=False),
        sa.Column("output_file", sa.Text()),
        sa.Column("error_file", sa.Text()),
        sa.Column("output_ttl_s", sa.Float(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("errors", sa.JSON(), nullable=False),
        sa.Column("num_lines", sa.Integer(), nullable=False),
        sa.Column("num_completed", sa.Integer(), nullable=False),
        sa.Column("num_failed", sa.Integer(), nullable=False),
        sa.Column("charge_usu", sa.BigInteger(), nullable=False),
        sa.Column("life", sa.Integer(), nullable=False),
        sa.Column("runner", sa.Text()),
        sa.Column("lease_expires_at", _TIME),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("in_progress_at", _TIME),
        sa.Column("cancelling_at", _TIME),
        sa.Column("finalizing_at", _TIME),
        sa.Column("ended_at", _TIME),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project"], ["projects.name"], name="fk_batches_project_projects", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_project_created_at", "batches", ["project", "created_at"])
    op.create_index("ix_batches_ended_at", "batches", ["ended_at"])

    op.create_table(
        "batch_lines",
        sa.Column("batch", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("offset_bytes", sa.BigInteger(), nullable=False),
        sa.Column("num_bytes", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("result", sa.Text()),
        sa.ForeignKeyConstraint(
            ["batch"], ["batches.id"], name="fk_batch_lines_batch_batches", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch", "number", name="pk_batch_lines"),
    )


def downgrade() -> None:
    op.drop_table("batch_lines")
    op.drop_table("batches")
    op.drop_table("files")
