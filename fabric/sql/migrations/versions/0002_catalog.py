"""Sites, models, launches and runs."""

import sqlalchemy as sa
from alembic import op

revision = "0002_catalog"
down_revision = "0001_ledger"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""


def upgrade() -> None:
    op.create_table(
        "sites",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("display", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_sites"),
    )

    op.create_table(
        "models",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text()),
        sa.Column("context_tokens", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.Text()),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("name", "revision", name="uq_models_name_revision"),
    )

    op.create_table(
        "launches",
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text()),
        sa.Column("token_sha256", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME),
        sa.Column("ended_reason", sa.Text()),
        sa.ForeignKeyConstraint(
            ["site"], ["sites.name"], name="fk_launches_site_sites", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("instance", name="pk_launches"),
        sa.UniqueConstraint("token_sha256", name="uq_launches_token_sha256"),
    )
    op.create_index("ix_launches_site", "launches", ["site"])

    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text()),
        sa.Column("site", sa.Text()),
        sa.Column("instance", sa.Text()),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("queue_s", sa.Float(), nullable=False),
        sa.Column("device_s", sa.Float(), nullable=False),
        sa.Column("charge_usu", sa.BigInteger(), nullable=False),
        sa.Column("first_token_s", sa.Float()),
        sa.Column("total_s", sa.Float()),
        sa.Column("placement", sa.Text()),
        sa.Column("error_code", sa.Text()),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("finished_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_project_created_at", "runs", ["project", "created_at"])


def downgrade() -> None:
    op.drop_table("runs")
    op.drop_table("launches")
    op.drop_table("models")
    op.drop_table("sites")
