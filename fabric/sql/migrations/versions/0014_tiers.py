"""What administrators change of the tiers; what is left out is the release's."""

import sqlalchemy as sa
from alembic import op

revision = "0014_tiers"
down_revision = "0013_adapter_seconds"
branch_labels = None
depends_on = None

_SECONDS = ("first_token_s", "token_s")
_SHARES = ("share_in_time", "share_answered")


def upgrade() -> None:
    positive = ("charge_factor_millionths", "weight", *_SECONDS)
    op.create_table(
        "tiers",
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("charge_factor_millionths", sa.BigInteger()),
        *(sa.Column(name, sa.Float()) for name in ("weight", *_SECONDS, *_SHARES)),
        *(sa.CheckConstraint(f"{one} > 0", name=f"ck_tiers_{one}_positive") for one in positive),
        *(
            sa.CheckConstraint(f"{one} > 0 AND {one} < 1", name=f"ck_tiers_{one}_part")
            for one in _SHARES
        ),
        sa.PrimaryKeyConstraint("tier", name="pk_tiers"),
    )


def downgrade() -> None:
    op.drop_table("tiers")
