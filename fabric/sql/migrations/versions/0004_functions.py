"""Registered functions."""

import sqlalchemy as sa
from alembic import op

revision = "0004_functions"
down_revision = "0003_auth"
branch_labels = None
depends_on = None

_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""


def upgrade() -> None:
    op.create_table(
        "functions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("fabric_version", sa.Text(), nullable=False),
        sa.Column("visibility", sa.Text(), nullable=False),
        sa.Column("group_id", sa.Text()),
        sa.Column("endpoint_id", sa.Text()),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("retired_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_functions"),
    )
    op.create_index("ix_functions_name", "functions", ["name"])


def downgrade() -> None:
    op.drop_table("functions")
