import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from fabric.ledger import Ledger
from fabric.sql import Database


class Clock:
    """A wall clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a migrated database of the test's own, on each kind of server."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_path"), tmp_path / "fabric.db")
        yield f"sqlite:///{tmp_path / 'fabric.db'}"
        return
    postgres, name = request.getfixturevalue("migrated_postgres"), uuid4().hex
    yield postgres.create(name, template="migrated")
    postgres.drop(name)


@pytest.fixture
def database(new_url: str) -> Iterator[Database]:
    with Database(new_url) as database:
        yield database


@pytest.fixture
def ledger(database: Database, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(database, clock=clock)
    yield ledger
    ledger.verify()
