"""The audit log: every change is in it, with the change or not at all, and tampering shows."""

from __future__ import annotations

import json
import os
import pwd
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, bindparam, insert, text, update
from sqlalchemy.exc import IntegrityError

from fabric.audit import AuditLog, recording
from fabric.audit.log import FIRST
from fabric.auth import Grants, Keys
from fabric.auth.tables import projects
from fabric.catalog import Catalog
from fabric.errors import AuditBroken, Duplicate, FabricError
from fabric.ledger import Ledger
from fabric.sql import Database

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Act = Callable[[Database], object]


@pytest.fixture
def log(database: Database) -> AuditLog:
    return AuditLog(database)


@pytest.fixture
def recorded(database: Database) -> Iterator[Database]:
    with recording(database, who="cli:root@here", what="test", clock=lambda: NOW):
        yield database


def tables(rows: object) -> list[str]:
    assert isinstance(rows, list)
    return [row["table"] for row in rows]


def test_an_entry_says_who_what_when_before_and_after(recorded: Database, log: AuditLog) -> None:
    keys = Keys(recorded)
    keys.add_project("astro", title="Stars")
    keys.modify_project("astro", title="Galaxies")
    keys.delete_project("astro")
    deleted, modified, added = log.entries()
    assert (added.seq, added.who, added.what, added.at) == (1, "cli:root@here", "test", NOW)
    assert added.before == []
    [row] = added.after
    assert (row["table"], row["name"], row["title"]) == ("projects", "astro", "Stars")
    assert [row["title"] for row in modified.before] == ["Stars"]
    assert [row["title"] for row in modified.after] == ["Galaxies"]
    assert [row["title"] for row in deleted.before] == ["Galaxies"]
    assert deleted.after == []


def test_no_secret_and_no_hash_of_one_is_in_it(recorded: Database, log: AuditLog) -> None:
    keys, catalog = Keys(recorded), Catalog(recorded)
    keys.add_project("astro")
    record, secret = keys.add_key("astro")
    catalog.add_site("alpha")
    catalog.add_model("m", "1", context_tokens=9, source="x")
    _, token = catalog.add_launch("alpha", "m")
    keys.revoke(record.id)
    told = json.dumps([[entry.before, entry.after] for entry in log.entries()], default=str)
    assert record.id in told
    for hidden in (secret, token, "secret_sha256", "token_sha256"):
        assert hidden not in told


def test_what_goes_with_a_deleted_row_is_told_too(recorded: Database, log: AuditLog) -> None:
    keys, grants = Keys(recorded), Grants(recorded)
    keys.add_project("astro")
    record, _ = keys.add_key("astro")
    grants.add(f"key:{record.id}", model="m")
    keys.delete_project("astro")
    gone = log.entries(limit=1)[0].before
    assert sorted(tables(gone)) == ["api_keys", "grants", "projects"]
    assert record.id in {row.get("id") for row in gone}


CHANGES: list[Act] = [
    lambda db: Catalog(db).add_site("alpha"),
    lambda db: Catalog(db).register_digest("m", "sha256:1"),
    lambda db: Ledger(db).set_rate("*", "*", prompt_usu=1, cached_prompt_usu=1, output_usu=1),
    lambda db: Ledger(db).grant("allocation:astro:*", 5),
    lambda db: Grants(db).close("model", "m"),
    lambda db: Grants(db).set_limit("key:*", max_concurrent=1),
]


@pytest.mark.parametrize("act", CHANGES)
def test_every_room_is_heard(database: Database, log: AuditLog, act: Act) -> None:
    Keys(database).add_project("astro")
    Catalog(database).add_model("m", "1", context_tokens=9, source="x")
    Ledger(database).open_allocation("astro", "*")
    assert log.entries() == []
    with recording(database, who="me", what="act"):
        act(database)
    [entry] = log.entries()
    assert entry.after
    act(database) if act is not CHANGES[0] else None
    assert len(log.entries()) == 1, "what is not recorded is in the log"


def test_money_is_told_from_the_journal_on(database: Database, log: AuditLog) -> None:
    Keys(database).add_project("astro")
    ledger = Ledger(database)
    with recording(database, who="me", what="alloc"):
        ledger.grant(ledger.open_allocation("astro", "*"), 5, memo="for a year")
    granted, opened = log.entries()
    assert {"allocations", "accounts"} <= set(tables(opened.after))
    assert {"journal", "entries", "accounts"} == set(tables(granted.after))
    assert set(tables(granted.before)) == {"accounts"}
    moved = [row["amount_usu"] for row in granted.after if row["table"] == "entries"]
    assert sorted(moved) == [-5, 5]
    assert "for a year" in {row.get("memo") for row in granted.after}
    with database.read() as connection:
        known = {name for (name,) in connection.execute(text("SELECT name FROM accounts"))}
    assert {row["name"] for row in opened.after if row["table"] == "accounts"} <= known


def test_reading_writes_nothing(recorded: Database, log: AuditLog) -> None:
    Keys(recorded).projects()
    Catalog(recorded).sites()
    log.verify()
    assert log.entries() == []


def test_what_is_undone_is_not_in_it(recorded: Database, log: AuditLog) -> None:
    keys = Keys(recorded)

    def add_and_fail(name: str) -> None:
        with recorded.transaction():
            keys.add_project(name)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        add_and_fail("astro")
    assert log.entries() == []
    with recorded.transaction():
        keys.add_project("astro")
        with pytest.raises(Duplicate):
            keys.add_project("astro")
        with pytest.raises(RuntimeError):
            add_and_fail("bio")
        keys.add_project("chem")
    [entry] = log.entries()
    assert [row["name"] for row in entry.after] == ["astro", "chem"]


def test_what_cannot_be_logged_is_not_done(
    recorded: Database, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the log is not there")

    monkeypatch.setattr("fabric.audit.recorder.append", fail)
    with pytest.raises(RuntimeError, match="the log"):
        Keys(recorded).add_project("astro")
    monkeypatch.undo()
    assert Keys(recorded).projects() == []
    Keys(recorded).add_project("astro")
    assert log.verify()[0] == 1


def test_many_rows_in_one_statement_are_all_told(recorded: Database, log: AuditLog) -> None:
    rows = [{"name": name, "title": "", "created_at": NOW} for name in ("a", "b", "c")]
    with recorded.transaction() as connection:
        connection.execute(insert(projects), rows)
        by_name = update(projects).where(projects.c.name == bindparam("which"))
        connection.execute(
            by_name.values(title=bindparam("new")),
            [{"which": "a", "new": "A"}, {"which": "b", "new": "B"}],
        )
    [entry] = log.entries()
    assert [(row["name"], row["title"]) for row in entry.before] == [("a", ""), ("b", "")]
    assert [(row["name"], row["title"]) for row in entry.after] == [
        *(("a", ""), ("b", ""), ("c", "")),
        *(("a", "A"), ("b", "B")),
    ]


# ---- the chain -----------------------------------------------------------------------------------


@pytest.fixture
def three(recorded: Database) -> Database:
    for name in ("a", "b", "c"):
        Keys(recorded).add_project(name)
    return recorded


def test_a_whole_chain_is_verified(three: Database, log: AuditLog) -> None:
    num_entries, sha256 = log.verify()
    assert num_entries == 3
    assert sha256 == log.entries(limit=1)[0].sha256
    assert log.verify(noted_sha256=sha256) == (3, sha256)
    assert log.entries(since=NOW + timedelta(seconds=1)) == []


def test_an_empty_log_is_whole(database: Database, log: AuditLog) -> None:
    assert log.verify() == (0, FIRST)


@pytest.mark.parametrize("statement", ["UPDATE audit SET who = 'x'", "DELETE FROM audit"])
def test_the_database_refuses_changes(three: Database, statement: str) -> None:
    with pytest.raises(IntegrityError, match="never changed"), three.transaction() as connection:
        connection.execute(text(statement))


def unguard(connection: Connection) -> None:
    """Do away with the triggers, as whoever owns the database can."""
    drops = ["DROP TRIGGER audit_no_update", "DROP TRIGGER audit_no_delete"]
    if connection.dialect.name == "postgresql":
        drops = ["DROP TRIGGER audit_unchanged ON audit"]
    for drop in drops:
        connection.execute(text(drop))


@pytest.mark.parametrize(
    ("statement", "seq"),
    [
        ("UPDATE audit SET who = 'nobody' WHERE seq = 2", 2),
        ("UPDATE audit SET after = '[]' WHERE seq = 1", 1),
        ("UPDATE audit SET at = at + 1 WHERE seq = 3", 3),
        ("DELETE FROM audit WHERE seq = 2", 2),
        ("DELETE FROM audit WHERE seq = 1", 1),
        ("UPDATE audit SET seq = 9 WHERE seq = 3", 3),
        ("UPDATE audit SET previous_sha256 = '' WHERE seq = 2", 2),
    ],
)
def test_tampering_past_the_triggers_shows(
    three: Database, log: AuditLog, statement: str, seq: int
) -> None:
    with three.transaction() as connection:
        unguard(connection)
        connection.execute(text(statement))
    with pytest.raises(AuditBroken) as broken:
        log.verify()
    assert broken.value.detail["seq"] == seq


def test_a_tail_that_was_cut_shows_by_the_hash_that_was_noted(
    three: Database, log: AuditLog
) -> None:
    _, noted = log.verify()
    with three.transaction() as connection:
        unguard(connection)
        connection.execute(text("DELETE FROM audit WHERE seq = 3"))
    assert log.verify()[0] == 2
    with pytest.raises(AuditBroken, match=noted):
        log.verify(noted_sha256=noted)


def test_two_at_once_make_one_chain(database: Database, tmp_path: Path) -> None:
    failed: list[FabricError] = []

    def work(who: str) -> None:
        with Database(database.url) as mine, recording(mine, who=who, what="project add"):
            for number in range(10):
                try:
                    Keys(mine).add_project(f"{who}-{number}")
                except FabricError as error:
                    failed.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert AuditLog(database).verify()[0] == 20


def test_a_log_of_many_pages_is_verified_in_order(
    recorded: Database, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabric.audit.log._PAGE", 3)
    for number in range(10):
        Keys(recorded).add_project(f"p{number}")
    assert log.verify()[0] == 10


def test_whoever_runs_a_command_is_named_by_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fabric.cli.admin.database import _who

    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert pwd.getpwuid(os.getuid()).pw_name in _who()
    assert "somebody-else" not in _who()
