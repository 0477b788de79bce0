"""Grants, private objects, limits, and the log of what administrators change."""

import sqlalchemy as sa
from alembic import op

revision = "0011_access"
down_revision = "0010_job_charges"
branch_labels = None
depends_on = None

_TIME = sa.BigInteger()
"""Microseconds since 1970, UTC."""

_MESSAGE = "rows of audit are never changed"


def upgrade() -> None:
    op.create_table(
        "grants",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("modes", sa.Text(), nullable=False),
        sa.Column("tiers", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_grants"),
        sa.UniqueConstraint("subject", "model", "site", name="uq_grants_subject_model_site"),
    )
    op.create_index("ix_grants_subject", "grants", ["subject"])
    op.create_table(
        "private_objects",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_private_objects"),
    )
    bounds = ("requests_per_min", "tokens_per_min", "max_concurrent")
    op.create_table(
        "limits",
        sa.Column("subject", sa.Text(), nullable=False),
        *(sa.Column(bound, sa.BigInteger()) for bound in bounds),
        sa.Column("created_at", _TIME, nullable=False),
        *(sa.CheckConstraint(f"{b} > 0", name=f"ck_limits_{b}_positive") for b in bounds),
        sa.PrimaryKeyConstraint("subject", name="pk_limits"),
    )
    version = op.create_table(
        "access_version",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_access_version"),
    )
    op.bulk_insert(version, [{"id": 1, "version": 0}])
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("previous_sha256", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
    )
    _forbid_changes()


def downgrade() -> None:
    for table in ("audit", "access_version", "limits", "private_objects", "grants"):
        op.drop_table(table)
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION audit_unchanged()")


def _forbid_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for change in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER audit_no_{change} BEFORE {change} ON audit"
                f" BEGIN SELECT RAISE(ABORT, '{_MESSAGE}'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_unchanged() RETURNS trigger LANGUAGE plpgsql"
        f" AS $$ BEGIN RAISE restrict_violation USING MESSAGE = '{_MESSAGE}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_unchanged BEFORE UPDATE OR DELETE ON audit"
        " FOR EACH ROW EXECUTE FUNCTION audit_unchanged()"
    )
