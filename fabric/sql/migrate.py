"""Bring a database to the newest schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, inspect, select, text

from fabric.sql.database import Database

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"

_LOCK = 0x666162726963
"""What processes that migrate one PostgreSQL database take in turn; any number would do."""


def migrate(database: Database, revision: str = "head") -> None:
    """Move the schema to ``revision`` in one transaction; at once if it is there already.

    Args:
        database: An open database.
        revision: The name of a migration, ``head`` for the newest, ``base`` for no tables at all
            (which loses what they hold).

    Raises:
        SettingInvalid: The database was migrated by a newer release.
        StorageFull: The disk is full; the schema is as before.
    """
    revisions = _get_revisions()
    target = {"head": revisions[-1], "base": None}.get(revision, revision)
    with database.read() as connection:
        if current_revision(connection) == target:
            return

    from alembic import command

    with database.transaction() as connection:
        if connection.dialect.name == "postgresql":  # SQLite lets one writer in by itself
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        current = current_revision(connection)
        if current is not None and current not in revisions:
            raise database.unusable(
                f"its schema is {current}, newer than this release's {revisions[-1]};"
                " upgrade this installation, or use another database"
            )
        forward = target is not None and (current is None or current < target)
        move = command.upgrade if forward else command.downgrade
        move(alembic_config(connection), target or "base")


def is_current(database: Database) -> bool:
    """Return whether an open database has this release's schema."""
    with database.read() as connection:
        return current_revision(connection) == _get_revisions()[-1]


def current_revision(connection: Connection) -> str | None:
    """Return the migration the database is at; ``None`` for one without tables."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def alembic_config(connection: Connection) -> Config:
    """Return Alembic's configuration of the migrations shipped here, on this connection."""
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _get_revisions() -> list[str]:
    return sorted(path.stem for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))
