import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    Text,
    bindparam,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, PendingRollbackError

from fabric.errors import StorageFull
from fabric.sql import Database, Prepared, Query, UtcTime

NOON = datetime(2026, 5, 4, 12, 0, 0, 123456, tzinfo=UTC)
COLUMNS = ("id", "name", "at", "is_good")

things = Table(
    "things",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("name", Text),
    Column("at", UtcTime),
    Column("is_good", Boolean),
)


class Thing(NamedTuple):
    id: int
    name: str | None
    at: datetime | None
    is_good: bool | None


class Id(NamedTuple):
    id: int


INSERT = Prepared(insert(things), columns=COLUMNS)
BY_ID = Query(select(things).where(things.c.id == bindparam("thing")), Thing)
GOOD = Query(
    select(things).where(things.c.is_good, things.c.name != "x").order_by(things.c.id), Thing
)
RENAME = Query(
    update(things)
    .where(things.c.id == bindparam("thing"))
    .values(name=bindparam("to"))
    .returning(things.c.id),
    Id,
)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'fabric.db'}"
        return
    postgres, name = request.getfixturevalue("postgres"), "prepared"
    yield postgres.create(name)
    postgres.drop(name)


@pytest.fixture
def database(new_url: str) -> Iterator[Database]:
    with Database(new_url) as database:
        with database.transaction() as connection:
            things.create(connection)
        yield database


def add(connection: Connection, *numbers: int) -> None:
    rows = [{"id": n, "name": f"n{n}", "at": NOON, "is_good": n % 2 == 1} for n in numbers]
    INSERT.run_many(connection, rows)


def names(database: Database) -> list[str | None]:
    with database.read() as connection:
        return list(connection.scalars(select(things.c.name).order_by(things.c.id)))


def test_rows_are_those_that_sqlalchemy_returns(database: Database) -> None:
    with database.transaction() as connection:
        add(connection, 1, 2, 3)
        INSERT.run(connection, {"id": 4, "name": None, "at": None, "is_good": None})
    with database.read() as connection:
        told = [tuple(row) for row in connection.execute(select(things).order_by(things.c.id))]
        found = [BY_ID.first(connection, {"thing": number}) for number in (1, 2, 3, 4, 5)]
        good = GOOD.all(connection, {})
    assert found == [*told, None]
    assert found[0] == Thing(1, "n1", NOON, True)
    assert [row.id for row in good] == [1, 3]
    assert good[0].is_good is True


def test_what_it_changed_is_returned_and_undone_with_its_block(database: Database) -> None:
    with database.transaction() as connection:
        add(connection, 1, 2)
        assert RENAME.all(connection, {"thing": 1, "to": "new"}) == [Id(1)]
        assert RENAME.all(connection, {"thing": 7, "to": "new"}) == []
    with suppress(ZeroDivisionError), database.transaction() as connection:
        RENAME.all(connection, {"thing": 2, "to": "newer"})
        raise ZeroDivisionError
    assert names(database) == ["new", "n2"]


@pytest.mark.parametrize("numbers", [(2, 1), (1,)])
def test_a_broken_rule_is_sqlalchemys_error_and_undoes_the_savepoint(
    database: Database, numbers: tuple[int, ...]
) -> None:
    with database.transaction() as outer:
        add(outer, 1)
        with pytest.raises(IntegrityError), database.transaction() as connection:
            add(connection, *numbers)
        add(outer, 3)
    assert names(database) == ["n1", "n3"]


def test_whoever_listens_to_the_engine_hears_of_it_and_may_stop_it(database: Database) -> None:
    heard = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def listen(_connection: object, _cursor: object, sql: str, *_: object) -> None:
        heard.append(sql.partition(" ")[0])
        if "UPDATE" in sql:
            raise ZeroDivisionError

    with suppress(ZeroDivisionError), database.transaction() as connection:
        add(connection, 1)
        RENAME.all(connection, {"thing": 1, "to": "new"})
    assert heard == ["INSERT", "UPDATE"]
    assert names(database) == []


def test_a_value_that_is_missing_or_naive_is_refused(database: Database) -> None:
    with database.transaction() as connection:
        with pytest.raises(KeyError, match="to"):
            RENAME.all(connection, {"thing": 1})
        with pytest.raises(TypeError):
            INSERT.run(
                connection, {"id": 1, "name": "a", "at": NOON.replace(tzinfo=None), "is_good": True}
            )


def test_rows_of_other_columns_are_refused() -> None:
    with pytest.raises(TypeError, match="name"):
        Query(select(things.c.id, things.c.name), Id)


@pytest.mark.parametrize("new_url", ["sqlite"], indirect=True)
def test_after_sqlite_has_undone_a_transaction_nothing_more_of_it_runs(database: Database) -> None:
    @event.listens_for(database.engine, "checkout")
    def limit(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute("PRAGMA max_page_count = 8")

    def fill_and_go_on() -> None:
        with database.transaction() as connection:
            add(connection, 1)
            with suppress(StorageFull), database.transaction():
                add(connection, *range(2, 10_000))
            add(connection, 1)

    with pytest.raises(PendingRollbackError):
        fill_and_go_on()
    assert names(database) == []
