import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, inspect, text

import fabric.adapters
import fabric.artifacts
import fabric.audit
import fabric.auth
import fabric.batches
import fabric.catalog
import fabric.ledger  # noqa: F401 - the rooms declare their tables when they are imported
from fabric.errors import SettingInvalid, StorageFull
from fabric.sql import Database, metadata, migrate
from fabric.sql.migrate import alembic_config, current_revision

SCHEMA = {
    "sqlite": "SELECT name, coalesce(sql, '') FROM sqlite_master WHERE name NOT LIKE '%alembic%'",
    "postgresql": """
        SELECT table_name, concat_ws(' ', column_name, data_type, is_nullable, column_default)
        FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name <> 'alembic_version'
        UNION SELECT indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename <> 'alembic_version'
        UNION SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conname NOT LIKE 'alembic%'
        UNION SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    """,
}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'fabric.db'}"
        return
    postgres, name = request.getfixturevalue("postgres"), uuid4().hex
    yield postgres.create(name)
    postgres.drop(name)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with Database(url) as database:
        yield database


def schema(database: Database) -> set[tuple[str, str]]:
    with database.read() as connection:
        rows = connection.execute(text(SCHEMA[connection.dialect.name]))
        return {(name, sql) for name, sql in rows}


def test_migrations_make_what_the_rooms_declare(database: Database) -> None:
    migrate(database)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_downgrade_to_nothing_and_up_again_is_the_same_schema(database: Database) -> None:
    migrate(database)
    before = schema(database)
    migrate(database, "base")
    assert schema(database) == set()
    migrate(database)
    assert schema(database) == before


def test_each_step_can_be_stopped_at(database: Database) -> None:
    with database.transaction() as connection:
        script = ScriptDirectory.from_config(alembic_config(connection))
        steps = [revision.revision for revision in script.walk_revisions()]
    for step in [*reversed(steps), *steps]:
        migrate(database, step)
        with database.read() as connection:
            assert current_revision(connection) == step


def test_revisions_are_named_as_their_files_in_order(database: Database) -> None:
    with database.transaction() as connection:
        script = ScriptDirectory.from_config(alembic_config(connection))
    steps = list(reversed(list(script.walk_revisions())))
    assert [Path(step.path).stem for step in steps] == [step.revision for step in steps]
    assert [step.revision for step in steps] == sorted(step.revision for step in steps)


def test_migrating_what_is_migrated_writes_nothing(database: Database) -> None:
    migrate(database)
    statements: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement.split()[0].upper())

    migrate(database)
    assert set(statements) <= {"BEGIN", "SELECT", "PRAGMA"}


def test_database_of_a_newer_release_is_refused_and_kept(database: Database) -> None:
    migrate(database)
    with database.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999_later'"))
    before = schema(database)
    with pytest.raises(SettingInvalid, match="9999_later"):
        migrate(database)
    assert schema(database) == before


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_disk_full_while_migrating_leaves_the_schema_as_it_was(database: Database) -> None:
    migrate(database, "0001_ledger")
    before = schema(database)

    @event.listens_for(database.engine, "checkout")
    def limit(connection: sqlite3.Connection, *_: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    with pytest.raises(StorageFull):
        migrate(database)
    assert schema(database) == before
    event.remove(database.engine, "checkout", limit)
    database.close()
    with database:
        migrate(database)
        assert len(schema(database)) > len(before)


def test_processes_that_start_together_migrate_once(url: str, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    program = """
import sys, time
from pathlib import Path
from fabric.sql import Database, migrate
gate = Path(sys.argv[2])
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.001)
with Database(sys.argv[1]) as database:
    migrate(database)
"""
    command = [sys.executable, "-c", program, url, str(gate)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    gate.touch()
    deadline_s = time.monotonic() + 60
    for process in started:
        _, errors = process.communicate(timeout=deadline_s - time.monotonic())
        assert (process.returncode, errors) == (0, "")
    with Database(url) as database, database.read() as connection:
        assert current_revision(connection) is not None
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
