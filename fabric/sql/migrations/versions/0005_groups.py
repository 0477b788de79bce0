"""Globus groups of projects."""

import sqlalchemy as sa
from alembic import op

revision = "0005_groups"
down_revision = "0004_functions"
branch_labels = None
depends_on = None

_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""


def upgrade() -> None:
    op.create_table(
        "project_groups",
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("max_concurrent", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint("max_concurrent > 0", name="ck_project_groups_max_concurrent_positive"),
        sa.ForeignKeyConstraint(
            ["project"],
            ["projects.name"],
            name="fk_project_groups_project_projects",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("group_id", "project", name="pk_project_groups"),
    )
    op.create_index("ix_project_groups_project", "project_groups", ["project"])


def downgrade() -> None:
    op.drop_table("project_groups")
