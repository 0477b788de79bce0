"""A Globus Auth of this machine, and a hub's database that knows its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fabric.auth import GlobusTokens, Groups, Users
from fabric.sql import Database
from fabric.testing.clock import Clock
from fabric.testing.globus.campus import Campus, running_campus


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def campus(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Campus]:
    with running_campus(clock.monotonic) as campus:
        for name, value in campus.service.environ.items():
            monkeypatch.setenv(name, value)
        yield campus


@pytest.fixture
def groups(database: Database, campus: Campus) -> Groups:
    return campus.add_groups(database)


@pytest.fixture
def users(database: Database) -> Users:
    return Users(database)


@pytest.fixture
def make_tokens(
    groups: Groups, users: Users, campus: Campus, clock: Clock
) -> Iterator[Callable[[], GlobusTokens]]:
    made: list[GlobusTokens] = []

    def make() -> GlobusTokens:
        made.append(campus.get_tokens(groups, users, clock=clock, monotonic=clock.monotonic))
        return made[-1]

    yield make
    for tokens in made:
        tokens.close()


@pytest.fixture
def tokens(make_tokens: Callable[[], GlobusTokens]) -> GlobusTokens:
    return make_tokens()
