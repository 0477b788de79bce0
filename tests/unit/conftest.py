"""What the tests of rooms with a database may use."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

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


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> Postgres:
    """A PostgreSQL with a migrated database, ``MIGRATED``, to make copies of."""
    with Database(postgres.create(MIGRATED)) as database:
        migrate(database)
    return postgres


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a migrated database of the test's own."""
    if getattr(request, "param", request.config.getoption("--database")) == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_path"), tmp_path / "fabric.db")
        yield f"sqlite:///{tmp_path / 'fabric.db'}"
        return
    postgres, name = request.getfixturevalue("migrated_postgres"), uuid4().hex
    yield postgres.create(name, template=MIGRATED)
    postgres.drop(name)


@pytest.fixture
def database(new_url: str) -> Iterator[Database]:
    with Database(new_url) as database:
        yield database
