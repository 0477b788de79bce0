import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, insert, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError, StatementError

from fabric.errors import SettingInvalid, StorageBusy, StorageFull
from fabric.sql import Database, UtcTime, utc_now
from fabric.sql import database as database_module

parents = Table("parents", MetaData(), Column("id", Integer, primary_key=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fabric.db"


@pytest.fixture(params=["a connection each", "one connection"])
def database(path: Path, request: pytest.FixtureRequest) -> Iterator[Database]:
    with Database(f"sqlite:///{path}") as database:
        with database.transaction() as connection:
            connection.execute(text("CREATE TABLE parents (id INTEGER PRIMARY KEY)"))
            connection.execute(
                text("CREATE TABLE children (parent INTEGER REFERENCES parents (id))")
            )
        with database.sharing() if request.param == "one connection" else nullcontext():
            yield database


def stored(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.execute(select(parents.c.id).order_by(parents.c.id)).scalars())


def add(database: Database, *numbers: int) -> None:
    with database.transaction() as connection:
        connection.execute(insert(parents), [{"id": number} for number in numbers])


class Trouble(Exception):
    pass


def test_constructor_touches_nothing(path: Path) -> None:
    database = Database(f"sqlite:///{path}")
    assert not path.exists()
    with pytest.raises(RuntimeError, match="not open"), database.transaction():
        pass
    database.close()


def test_file_and_its_log_are_private(database: Database, path: Path) -> None:
    add(database, 1)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["fabric.db", "fabric.db-shm", "fabric.db-wal"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_failed_transaction_leaves_nothing(database: Database) -> None:
    def work() -> None:
        with database.transaction() as connection:
            connection.execute(insert(parents), {"id": 1})
            raise Trouble

    with pytest.raises(Trouble):
        work()
    assert stored(database) == []


def test_inner_transaction_is_undone_with_the_outer_one(database: Database) -> None:
    def work() -> None:
        with database.transaction():
            add(database, 1)
            raise Trouble

    with pytest.raises(Trouble):
        work()
    assert stored(database) == []


def test_failed_inner_transaction_leaves_the_outer_ones_work(database: Database) -> None:
    with database.transaction():
        add(database, 1)
        with pytest.raises(IntegrityError):
            add(database, 2, 1)
        add(database, 3)
        assert stored(database) == [1, 3]
    assert stored(database) == [1, 3]


def test_what_joins_a_transaction_is_undone_with_it(database: Database) -> None:
    with database.joined() as connection:
        connection.execute(insert(parents), {"id": 1})
    with suppress(Trouble), database.transaction() as outer:
        with database.joined() as connection:
            assert connection is outer
            connection.execute(insert(parents), {"id": 2})
        raise Trouble
    assert stored(database) == [1]


def test_checkpoint_copies_the_log_while_another_writes(database: Database, path: Path) -> None:
    def in_file() -> list[tuple[int]]:
        alone = sqlite3.connect(f"file:{path}?immutable=1", uri=True)
        with closing(alone), suppress(sqlite3.OperationalError):
            return alone.execute("SELECT id FROM parents").fetchall()
        return []  # The table itself is in the log.

    add(database, 1)
    assert in_file() == []
    with database.transaction() as connection:
        connection.execute(insert(parents), {"id": 2})
        database.checkpoint()
        assert in_file() == [(1,)]
    assert stored(database) == [1, 2]


def test_reads_share_one_snapshot_and_keep_no_writer_waiting(
    database: Database, path: Path
) -> None:
    with database.read() as connection:
        before = connection.execute(select(parents.c.id)).all()
        with Database(f"sqlite:///{path}") as other:
            add(other, 1)
        assert connection.execute(select(parents.c.id)).all() == before == []
        assert stored(database) == []
        add(database, 2)
        assert stored(database) == []
    assert stored(database) == [1, 2]


def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(IntegrityError), database.transaction() as connection:
        connection.execute(text("INSERT INTO children VALUES (7)"))


def test_lock_held_too_long_is_a_typed_error(
    path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.05)
    with (
        database.transaction(),
        Database(f"sqlite:///{path}") as other,
        pytest.raises(StorageBusy) as caught,
    ):
        add(other, 1)
    assert caught.value.retryable
    with Database(f"sqlite:///{path}") as other:
        add(other, 1)


def test_full_database_is_a_typed_error_and_undoes_the_transaction(database: Database) -> None:
    @event.listens_for(database.engine, "checkout")
    def limit(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute("PRAGMA max_page_count = 8")

    def work() -> None:
        with database.transaction():
            add(database, 1)
            with suppress(StorageFull):
                add(database, *too_many)
            add(database, 2)

    too_many = range(3, 10_000)
    add(database, 0)
    with pytest.raises(StorageFull) as caught:
        add(database, *too_many)
    assert caught.value.http_status == 507
    with pytest.raises(PendingRollbackError):  # SQLite undid the outer one too: it must not go on
        work()
    assert stored(database) == [0]
    add(database, 1)
    assert stored(database) == [0, 1]


def test_file_that_may_not_grow_is_a_typed_error(database: Database, path: Path) -> None:
    program = """
import resource, sys
from sqlalchemy import text
from fabric.errors import StorageFull
from fabric.sql import Database
with Database(sys.argv[1]) as database:
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    for number in range(1000):
        try:
            with database.transaction() as connection:
                connection.execute(text("INSERT INTO parents VALUES (:n)"), {"n": number})
        except StorageFull:
            print(number)
            break
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, database.url], capture_output=True, text=True, check=True
    )
    num_stored = int(ran.stdout)
    assert num_stored > 0
    assert stored(database) == list(range(num_stored))


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://localhost/fabric",
        "no-such-dialect://",
        "postgresql+no_such_driver://localhost/fabric",
        "nothing at all",
        "sqlite:////no/such/directory/fabric.db",
        "sqlite:////",
    ],
)
def test_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        Database(url).open()
    assert caught.value.detail["setting"] == "hub.database_url"


def test_file_that_is_no_database_is_refused_and_kept(path: Path) -> None:
    path.write_bytes(b"a letter to a friend" * 100)
    with pytest.raises(SettingInvalid, match="not a database"):
        Database(f"sqlite:///{path}").open()
    assert path.read_bytes().startswith(b"a letter")


def test_password_is_not_shown() -> None:
    with pytest.raises(SettingInvalid) as caught:
        Database("postgresql+no_such_driver://user:hunter2@localhost/fabric").open()
    assert "hunter2" not in caught.value.message


def test_times_come_back_in_utc_to_the_microsecond(database: Database) -> None:
    moments = Table("moments", MetaData(), Column("at", UtcTime))
    there = datetime(2026, 3, 1, 4, 5, 6, 789012, tzinfo=timezone(timedelta(hours=-7)))
    with database.transaction() as connection:
        moments.create(connection)
        connection.execute(insert(moments), [{"at": there}, {"at": None}])
        back, nothing = connection.execute(select(moments.c.at)).scalars()
    assert back == there
    assert back.tzinfo is UTC
    assert nothing is None
    assert utc_now().tzinfo is UTC


def test_naive_time_is_refused(database: Database) -> None:
    moments = Table("moments", MetaData(), Column("at", UtcTime))
    with database.transaction() as connection:
        moments.create(connection)
    with pytest.raises(StatementError), database.transaction() as connection:
        connection.execute(insert(moments), {"at": datetime(2026, 3, 1)})


def test_transactions_share_a_connection_meanwhile(path: Path) -> None:
    taken = []
    with Database(f"sqlite:///{path}") as database:
        event.listen(database.engine, "checkout", lambda *_: taken.append(1))
        with database.sharing():
            for _ in range(3):
                with database.transaction():
                    pass
            assert len(taken) == 1
            database.close()
            database.open()
            with database.transaction() as connection:
                assert connection.engine is database.engine
        event.listen(database.engine, "checkout", lambda *_: taken.append(1))
        for _ in range(2):
            with database.transaction():
                pass
        assert len(taken) == 3
