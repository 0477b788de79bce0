"""What the tests of rooms with a database may use."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.sql import Database, migrate
from fabric.testing.postgres import Postgres

MIGRATED = "migrated"


@pytest.fixture(scope="session")
def migrated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "fabric.db"
    with Database(f"sqlite:///{path}") as database:
        migrate(database)
    return path


@pytest.fixture
def database(migrated_path: Path, tmp_path: Path) -> Iterator[Database]:
    shutil.copy(migrated_path, tmp_path / "fabric.db")
    with Database(f"sqlite:///{tmp_path / 'fabric.db'}") as database:
        yield database


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> Postgres:
    """A PostgreSQL with a migrated database, ``MIGRATED``, to make copies of."""
    with Database(postgres.create(MIGRATED)) as database:
        migrate(database)
    return postgres
