from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

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


@pytest.fixture
def ledger(database: Database, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(database, clock=clock)
    yield ledger
    ledger.verify()
