"""Intervention programs: what they move is counted and priced, what they need is kept."""

import sqlalchemy as sa
from alembic import op

revision = "0008_programs"
down_revision = "0007_batches"
branch_labels = None
depends_on = None

_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""

_COUNTS = {
    "rates": ("hook_in_usu_per_mbyte", "hook_out_usu_per_mbyte", "device_usu_per_million_s"),
    "runs": ("hook_bytes_in", "hook_bytes_out"),
    "redemptions": ("max_hook_bytes_in", "max_hook_bytes_out"),
}


def upgrade() -> None:
    for table, names in _COUNTS.items():
        for name in names:
            count = sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")
            op.add_column(table, count)
    seconds = sa.Column("max_device_s", sa.Float(), nullable=False, server_default="0")
    op.add_column("redemptions", seconds)
    for table in ("redemptions", "runs"):
        op.add_column(table, sa.Column("program", sa.Text()))
    op.add_column("tickets", sa.Column("scopes", sa.Text()))

    op.create_table(
        "artifacts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("run", sa.Text()),
        sa.Column("part", sa.Text()),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project"], ["projects.name"], name="fk_artifacts_project_projects", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
    )
    op.create_index("ix_artifacts_project", "artifacts", ["project"])
    op.create_index("ix_artifacts_sha256", "artifacts", ["sha256"])
    op.create_index("ix_artifacts_expires_at", "artifacts", ["expires_at"])


def downgrade() -> None:
    op.drop_table("artifacts")
    op.drop_column("tickets", "scopes")
    for table in ("runs", "redemptions"):
        op.drop_column(table, "program")
    op.drop_column("redemptions", "max_device_s")
    for table, names in _COUNTS.items():
        for name in names:
            op.drop_column(table, name)
