"""Seconds that runs had the slot of an adapter."""

import sqlalchemy as sa
from alembic import op

revision = "0013_adapter_seconds"
down_revision = "0012_accounts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("adapter_s", sa.Float(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("runs", "adapter_s")
