from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from fabric.ledger import Ledger
from fabric.sql import Database

BACKENDS = ("sqlite", "postgresql")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The ledger is tested on each kind of database, but for what says otherwise itself."""
    marked = {one.args[0] for one in metafunc.definition.iter_markers("parametrize")}
    if "new_url" in metafunc.fixturenames and "new_url" not in marked:
        metafunc.parametrize("new_url", BACKENDS, indirect=True)


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


@pytest.fixture
def ledger(database: Database, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(database, clock=clock)
    yield ledger
    ledger.verify()


@pytest.fixture
def allocation(ledger: Ledger) -> str:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 1000)
    return name
