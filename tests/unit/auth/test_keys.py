import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from fabric.auth import Identity, KeyRecord, Keys, require, require_site
from fabric.errors import (
    Duplicate,
    KeyExpired,
    KeyInvalid,
    KeyMissing,
    NotFound,
    PermissionDenied,
    RequestInvalid,
)
from fabric.sql import Database
from fabric.testing.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_keys(database: Database, clock: Clock) -> Callable[[], Keys]:
    return lambda: Keys(database, clock=clock, monotonic=clock.monotonic)


@pytest.fixture
def keys(make_keys: Callable[[], Keys]) -> Keys:
    keys = make_keys()
    keys.add_project("astro", title="Astrophysics")
    return keys


def add(keys: Keys, **more: object) -> tuple[KeyRecord, str]:
    return keys.add_key("astro", **more)


def test_key_identifies_its_project(keys: Keys) -> None:
    record, key = add(keys, label="laptop", scopes=("query", "admin"), max_concurrent=3)
    assert keys.authenticate(key) == Identity(
        key_id=record.id,
        project="astro",
        scopes=frozenset({"query", "admin"}),
        max_concurrent=3,
        site=None,
    )


def test_key_has_the_documented_form_and_its_id_in_it(keys: Keys) -> None:
    record, key = add(keys)
    match = re.fullmatch(r"fab_(\w{12})_([0-9A-Za-z]{32,})", key)
    assert match is not None
    assert match[1] == record.id
    assert add(keys)[1] != key


def test_secret_is_neither_stored_nor_kept_in_memory(
    keys: Keys, database: Database, tmp_path: Path
) -> None:
    _, key = add(keys)
    keys.authenticate(key)
    secret = key.rpartition("_")[2]
    files = b"".join(path.read_bytes() for path in tmp_path.glob("fabric.db*"))
    assert secret.encode() not in files
    assert secret not in repr(vars(keys))


def test_no_key_is_an_error_of_its_own(keys: Keys) -> None:
    for bearer in (None, ""):
        with pytest.raises(KeyMissing):
            keys.authenticate(bearer)


def test_wrong_key_is_refused(keys: Keys) -> None:
    record, key = add(keys)
    other, _ = add(keys)
    forged = [
        key[:-1],
        key + "x",
        key[:-1] + ("a" if key[-1] != "a" else "b"),
        key.replace(record.id, other.id),
        key.replace(record.id, "0" * 12),
        key.upper(),
        f"Bearer {key}",
        f"{key}\n",
        "fab__",
        "ключ",
        "x" * 100_000,
    ]
    for bearer in forged:
        with pytest.raises(KeyInvalid):
            keys.authenticate(bearer)
    keys.authenticate(key)


def test_key_ends_at_its_time_even_when_it_was_just_used(keys: Keys, clock: Clock) -> None:
    _, key = add(keys, expires_at=clock.now + timedelta(seconds=30))
    clock.advance(29)
    keys.authenticate(key)
    clock.advance(1)
    with pytest.raises(KeyExpired):
        keys.authenticate(key)
    assert keys.recall(key) is None


def test_revoked_key_is_refused_at_once(keys: Keys, clock: Clock) -> None:
    record, key = add(keys)
    keys.authenticate(key)
    assert keys.revoke(record.id).revoked_at == clock.now
    with pytest.raises(KeyInvalid):
        keys.authenticate(key)
    clock.advance(5)
    assert keys.revoke(record.id).revoked_at == clock.now - timedelta(seconds=5)


def test_key_revoked_by_another_process_lives_on_for_a_minute_at_most(
    keys: Keys, make_keys: Callable[[], Keys], clock: Clock
) -> None:
    record, key = add(keys)
    keys.authenticate(key)
    make_keys().revoke(record.id)
    clock.advance(59)
    keys.authenticate(key)
    clock.advance(1)
    with pytest.raises(KeyInvalid):
        keys.authenticate(key)


def test_key_revoked_while_it_is_looked_up_is_not_remembered(
    keys: Keys,
) -> None:
    record, key = add(keys)

    def revoke_meanwhile(connection, cursor, statement: str, *_: object) -> None:
        if "secret_sha256" in statement:
            keys.revoke(record.id)

    event.listen(Engine, "after_cursor_execute", revoke_meanwhile)
    try:
        keys.authenticate(key)
    finally:
        event.remove(Engine, "after_cursor_execute", revoke_meanwhile)
    with pytest.raises(KeyInvalid):
        keys.authenticate(key)


def test_known_key_is_answered_without_the_database(keys: Keys, database: Database) -> None:
    _, key = add(keys)
    assert keys.recall(key) is None
    identity = keys.authenticate(key)
    database.close()
    assert keys.authenticate(key) == keys.recall(key) == identity


def test_changed_key_counts_at_once(keys: Keys, clock: Clock) -> None:
    record, key = add(keys, label="old")
    keys.authenticate(key)
    changed = keys.modify(record.id, label="new", max_concurrent=2, scopes=("admin",))
    assert keys.key(record.id) == changed
    assert (changed.label, changed.expires_at) == ("new", None)
    identity = keys.authenticate(key)
    assert (identity.max_concurrent, identity.scopes) == (2, frozenset({"admin"}))
    for number in (-1, 0, 10**6 + 1, 10**20):
        with pytest.raises(RequestInvalid, match=str(number)):
            keys.modify(record.id, max_concurrent=number)
    keys.modify(record.id, expires_at=clock.now)
    with pytest.raises(KeyExpired):
        keys.authenticate(key)


def test_keys_are_listed_in_order_without_secrets(keys: Keys, clock: Clock) -> None:
    keys.add_project("bio")
    first, _ = add(keys)
    clock.advance(1)
    second, _ = keys.add_key("bio")
    assert keys.keys() == [first, second]
    assert keys.keys("bio") == [second]


def test_site_key_is_bound_to_its_site(keys: Keys) -> None:
    _, key = add(keys, scopes=("site",), site="alpha")
    identity = keys.authenticate(key)
    require_site(identity, "alpha")
    with pytest.raises(PermissionDenied):
        require_site(identity, "beta")
    with pytest.raises(PermissionDenied):
        require(identity, "query")


def test_no_scope_implies_another(keys: Keys) -> None:
    for scope in ("query", "admin"):
        _, key = add(keys, scopes=(scope,))
        identity = keys.authenticate(key)
        require(identity, scope)
        for other in {"query", "admin", "site"} - {scope}:
            with pytest.raises(PermissionDenied):
                require(identity, other)
        with pytest.raises(PermissionDenied):
            require_site(identity, "alpha")


@pytest.mark.parametrize(
    "fields",
    [
        {"scopes": ("query", "root")},
        {"scopes": ("site",)},
        {"scopes": ("query",), "site": "alpha"},
        {"max_concurrent": 0},
    ],
)
def test_key_that_makes_no_sense_is_refused(keys: Keys, fields: dict[str, object]) -> None:
    with pytest.raises(RequestInvalid):
        add(keys, **fields)
    assert keys.keys() == []


def test_unknown_names_are_errors(keys: Keys) -> None:
    for act in (keys.key, keys.revoke, keys.modify, keys.project, keys.add_key):
        with pytest.raises(NotFound):
            act("absent")
    with pytest.raises(NotFound):
        keys.modify_project("absent", title="x")
    with pytest.raises(NotFound):
        keys.delete_project("absent")


@pytest.mark.parametrize("name", ["", "Astro", "a b", "a:b", "-a", "a" * 64, "ä"])
def test_project_name_that_cannot_be_used_is_refused(keys: Keys, name: str) -> None:
    with pytest.raises(RequestInvalid):
        keys.add_project(name)


def test_projects_are_kept_by_name(keys: Keys) -> None:
    with pytest.raises(Duplicate):
        keys.add_project("astro")
    bio = keys.add_project("bio")
    assert [project.name for project in keys.projects()] == ["astro", "bio"]
    assert keys.project("bio") == bio
    assert keys.modify_project("bio", title="Biology").title == "Biology"


def test_sites_of_a_project_are_named_and_go_with_it(keys: Keys) -> None:
    kept = keys.add_project("clinic", sites=["delta", "anvil", "delta"])
    assert kept.sites == ("anvil", "delta")
    assert keys.project("clinic") == kept
    assert keys.modify_project("clinic", title="Clinic").sites == kept.sites
    assert keys.modify_project("clinic", sites=["anvil"]).sites == ("anvil",)
    for wrong in ("", "*", "Anvil", "a:b", "x" * 64):
        with pytest.raises(RequestInvalid, match=r"no site's name"):
            keys.modify_project("clinic", sites=["delta", wrong])
        with pytest.raises(RequestInvalid):
            keys.add_project("other", sites=[wrong])
    assert [one.sites for one in keys.projects() if one.name in ("clinic", "other")] == [("anvil",)]
    with pytest.raises(NotFound):
        keys.modify_project("unheard-of", sites=["anvil"])
    keys.delete_project("clinic")
    assert keys.add_project("clinic").sites == ()


def test_deleted_project_takes_its_keys_along(keys: Keys) -> None:
    _, key = add(keys)
    keys.authenticate(key)
    keys.delete_project("astro")
    with pytest.raises(KeyInvalid):
        keys.authenticate(key)
    assert keys.keys() == []
