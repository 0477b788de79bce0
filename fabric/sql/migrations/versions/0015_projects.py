"""People of projects beside groups, who is kept out, logins by name, and where projects stay."""

import sqlalchemy as sa
from alembic import op

revision = "0015_projects"
down_revision = "0014_tiers"
branch_labels = None
depends_on = None

_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""


def upgrade() -> None:
    op.create_table(
        "project_users",
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("max_concurrent", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint("max_concurrent > 0", name="ck_project_users_max_concurrent_positive"),
        sa.ForeignKeyConstraint(
            ["project"],
            ["projects.name"],
            name="fk_project_users_project_projects",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("user", "project", name="pk_project_users"),
    )
    op.create_index("ix_project_users_project", "project_users", ["project"])
    op.create_table(
        "blocked_users",
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("user", name="pk_blocked_users"),
    )
    op.create_table(
        "logins",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_logins"),
    )
    op.create_index("ix_logins_name", "logins", ["name"])
    op.create_table(
        "project_sites",
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project"],
            ["projects.name"],
            name="fk_project_sites_project_projects",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("project", "site", name="pk_project_sites"),
    )


def downgrade() -> None:
    for table in ("project_sites", "logins", "blocked_users", "project_users"):
        op.drop_table(table)
