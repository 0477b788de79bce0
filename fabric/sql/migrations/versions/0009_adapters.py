"""Adapters, and which one a run was answered with."""

import sqlalchemy as sa
from alembic import op

revision = "0009_adapters"
down_revision = "0008_programs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("num_layers", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project"], ["projects.name"], name="fk_adapters_project_projects", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("project", "name", name="pk_adapters"),
    )
    op.create_index("ix_adapters_digest", "adapters", ["digest"])
    op.add_column("runs", sa.Column("adapter", sa.Text()))


def downgrade() -> None:
    op.drop_column("runs", "adapter")
    op.drop_table("adapters")
