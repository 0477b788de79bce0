"""Grants, private objects and limits as administrators keep them, and hubs hear of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from fabric.auth import Authenticator, Decision, Grants, Groups, Identity, Keys, Limit, Rulebook
from fabric.auth.rules import FRESH_S, MAX_AGE_S
from fabric.errors import Duplicate, KeyInvalid, NotFound, RequestInvalid, StorageBusy
from fabric.sql import Database, Offload
from fabric.testing.clock import Clock
from fabric.testing.hub import eventually

GROUP = "6c91e6eb-085c-11e6-a7a5-22000bf2d559"


@pytest.fixture
def keys(database: Database) -> Keys:
    keys = Keys(database)
    keys.add_project("astro")
    return keys


@pytest.fixture
def grants(database: Database, keys: Keys) -> Grants:
    return Grants(database)


@pytest.fixture
async def offload(database: Database) -> AsyncIterator[Offload]:
    offload = Offload(database)
    yield offload
    offload.close()


def caller(key_id: str = "k", project: str = "astro") -> Identity:
    return Identity(key_id=key_id, project=project, scopes=frozenset(), max_concurrent=8)


def test_the_first_grant_makes_its_object_private(grants: Grants) -> None:
    grants.add("project:astro", model="llama")
    grants.add("project:astro", site="alpha")
    grants.add("project:astro", model="gemma", site="beta")
    grants.add("project:astro", model="*")
    assert grants.private() == [("model", "gemma"), ("model", "llama"), ("site", "alpha")]


def test_the_last_grant_taken_back_opens_nothing(grants: Grants) -> None:
    grant = grants.add("project:astro", model="llama")
    assert grants.delete(grant.id) == grant
    assert grants.private() == [("model", "llama")]
    grants.open("model", "llama")
    assert grants.private() == []
    with pytest.raises(NotFound):
        grants.open("model", "llama")


@pytest.mark.parametrize(
    "subject",
    [
        *("astro", "project:", "team:astro", "key", ":", "", "**", "user:alice", "group:people"),
        *("project:*", "user:a b@c", "user:" + "a" * 9999 + "@x", "group:" + "0" * 40),
    ],
)
def test_a_subject_that_is_none_is_refused(grants: Grants, subject: str) -> None:
    with pytest.raises(RequestInvalid, match="subject"):
        grants.add(subject, model="llama")
    assert grants.private() == []


@pytest.mark.parametrize("subject", ["project:absent", "key:0123"])
def test_a_subject_that_does_not_exist_is_refused(grants: Grants, subject: str) -> None:
    with pytest.raises(NotFound):
        grants.add(subject, model="llama")
    with pytest.raises(NotFound):
        grants.set_limit(subject, max_concurrent=1)


@pytest.mark.parametrize(
    ("subject", "kept"),
    [
        ("*", "*"),
        (f"group:{GROUP.upper()}", f"group:{GROUP}"),
        ("user:Alice@Example.EDU", "user:alice@example.edu"),
        (f"user:{GROUP}", f"user:{GROUP}"),
    ],
)
def test_subjects_are_kept_as_callers_are_named(grants: Grants, subject: str, kept: str) -> None:
    assert grants.add(subject, model="llama").subject == kept
    assert [one.subject for one in grants.grants(subject=kept)] == [kept]


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"model": "llama@1"},
        {"model": ""},
        {"model": "x" * 200},
        {"model": "a b; DROP"},
        {"site": "Alpha"},
        {"site": "alpha\n"},
        {"model": "llama", "modes": ["fly"]},
        {"model": "llama", "modes": []},
        {"model": "llama", "tiers": ["now"]},
    ],
)
def test_what_is_no_object_mode_or_tier_is_refused(grants: Grants, what: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid):
        grants.add("project:astro", **what)
    assert (grants.grants(), grants.private()) == ([], [])


def test_the_same_grant_is_not_made_twice(grants: Grants) -> None:
    grants.add("project:astro", model="llama")
    with pytest.raises(Duplicate, match="model llama"):
        grants.add("project:astro", model="llama", modes=["query"])
    grants.add("project:astro", model="llama", site="alpha")


def test_a_grant_is_changed_in_place(grants: Grants) -> None:
    grant = grants.add("project:astro", model="llama")
    changed = grants.modify(grant.id, modes=["query"])
    assert (changed.modes, changed.tiers) == ({"query"}, grant.tiers)
    assert grants.grant(grant.id) == changed
    with pytest.raises(RequestInvalid):
        grants.modify(grant.id, tiers=["never"])
    for act in (grants.modify, grants.delete, grants.grant):
        with pytest.raises(NotFound):
            act("absent")


def test_a_new_project_of_an_old_name_has_nothing(grants: Grants, keys: Keys) -> None:
    record, _ = keys.add_key("astro")
    for subject in ("project:astro", f"key:{record.id}"):
        grants.add(subject, model="llama")
        grants.set_limit(subject, max_concurrent=1)
    keys.delete_project("astro")
    assert (grants.grants(), grants.limits()) == ([], [])
    assert grants.private() == [("model", "llama")]


def test_limits_are_set_replaced_and_taken_away(grants: Grants) -> None:
    grants.set_limit("project:astro", requests_per_min=5, tokens_per_min=100)
    grants.set_limit("project:astro", requests_per_min=6)
    grants.set_limit("key:*", max_concurrent=2)
    assert grants.limits() == [
        Limit(subject="key:*", max_concurrent=2),
        Limit(subject="project:astro", requests_per_min=6),
    ]
    assert grants.delete_limit("key:*").max_concurrent == 2
    with pytest.raises(NotFound):
        grants.delete_limit("key:*")


@pytest.mark.parametrize("value", [0, -1, 10**30])
def test_a_limit_that_is_none_is_refused(grants: Grants, value: int) -> None:
    with pytest.raises(RequestInvalid, match=r"requests_per_min"):
        grants.set_limit("project:astro", requests_per_min=value)
    with pytest.raises(RequestInvalid, match="at least one"):
        grants.set_limit("project:astro")


# ---- how hubs hear of it ---------------------------------------------------------------------


async def test_rules_are_read_again_only_when_they_changed(
    grants: Grants, offload: Offload, clock: Clock
) -> None:
    book = Rulebook(offload, monotonic=clock.monotonic)
    first = await book.current()
    clock.advance(2 * MAX_AGE_S)
    assert await book.current() is first
    grant = grants.add("project:astro", model="llama")
    assert await book.current() is first
    clock.advance(2 * MAX_AGE_S)
    assert (await book.permits(caller())).grants == (grant,)
    assert (await book.permits(caller(project="bio"))).grants == ()


async def test_rules_of_a_certain_age_serve_while_newer_ones_are_read(
    grants: Grants, offload: Offload, clock: Clock
) -> None:
    book = Rulebook(offload, monotonic=clock.monotonic)
    first = await book.current()
    grants.close("model", "llama")
    clock.advance((FRESH_S + MAX_AGE_S) / 2)
    assert await book.current() is first
    await eventually(lambda: book.known.models == {"llama"})


async def test_rules_that_cannot_be_read_admit_nobody(
    grants: Grants, offload: Offload, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Rulebook(offload, monotonic=clock.monotonic)
    await book.current()
    clock.advance(2 * MAX_AGE_S)

    def read() -> None:
        raise StorageBusy(reason="locked")

    with monkeypatch.context() as patched:
        patched.setattr(offload.database, "read", read)
        for outcome in await asyncio.gather(
            *(book.current() for _ in range(3)), return_exceptions=True
        ):
            assert isinstance(outcome, StorageBusy)
    assert (await book.current()).version == book.known.version


async def test_a_limit_of_ones_own_comes_before_that_of_all(
    grants: Grants, offload: Offload, keys: Keys
) -> None:
    record, _ = keys.add_key("astro")
    for subject, most in [("key:*", 5), (f"key:{record.id}", 9), ("project:*", 20), ("user:*", 7)]:
        grants.set_limit(subject, max_concurrent=most)
    rules = await Rulebook(offload).current()

    def limits_of(who: Identity) -> list[tuple[str, int | None]]:
        return [(shared_by, one.max_concurrent) for shared_by, one in rules.limits_of(who)]

    assert limits_of(caller(record.id)) == [(f"key:{record.id}", 9), ("project:astro", 20)]
    assert limits_of(caller("other")) == [("key:other", 5), ("project:astro", 20)]
    assert limits_of(caller("globus:u")) == [("user:u", 7), ("project:astro", 20)]


async def test_what_another_process_takes_back_is_gone_within_a_second(
    grants: Grants, keys: Keys, offload: Offload, database: Database
) -> None:
    record, secret = keys.add_key("astro")
    grant = grants.add(f"key:{record.id}", model="llama")
    book = Rulebook(offload)
    hub = Authenticator(Keys(database), offload, rules=book)
    identity = await hub.identify(secret)
    asked = {"model": "llama", "modes": ["query"]}
    assert (await book.permits(identity)).decide(**asked) is Decision.ALLOWED
    program = """
import sys, time
from fabric.auth import Grants, Keys
from fabric.sql import Database
with Database(sys.argv[1]) as database:
    Grants(database).delete(sys.argv[2])
    print(time.time(), flush=True)
    sys.stdin.readline()
    Keys(database).revoke(sys.argv[3])
    print(time.time(), flush=True)
"""
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, database.url, grant.id, record.id),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdin is not None
    try:
        taken_at = float(await other.stdout.readline())
        answers = []
        while not answers or answers[-1][1] is Decision.ALLOWED:
            began_at = time.time()
            answers.append((began_at, (await book.permits(identity)).decide(**asked)))
            await asyncio.sleep(0.01)
        # Whoever asked more than a second after it was taken back has never been let in.
        late = [how for at, how in answers if at > taken_at + 1.0]
        assert set(late) <= {Decision.HIDDEN}
        other.stdin.write(b"\n")
        await other.stdin.drain()
        revoked_at = float(await other.stdout.readline())
        while True:
            began_at = time.time()
            try:
                await hub.identify(secret)
            except KeyInvalid:
                break
            assert began_at <= revoked_at + 1.0
            await asyncio.sleep(0.01)
    finally:
        other.stdin.close()
        await other.wait()
        hub.close()


async def test_groups_are_heard_of_by_the_same_number(
    database: Database, keys: Keys, offload: Offload, clock: Clock
) -> None:
    book, groups = Rulebook(offload, monotonic=clock.monotonic), Groups(database)
    versions = [(await book.current()).version]
    for act in (groups.add, groups.delete):
        act(GROUP, "astro")
        clock.advance(2 * MAX_AGE_S)
        versions.append((await book.current()).version)
    assert versions == sorted(set(versions))


def test_grants_survive_the_process_and_are_there_for_the_next(
    grants: Grants, database: Database
) -> None:
    grant = grants.add("project:astro", model="llama", modes=["query", "embed"])
    with Database(database.url) as again:
        assert Grants(again).grants() == [grant]
        with again.read() as connection:
            version = connection.execute(text("SELECT version FROM access_version")).scalar_one()
    assert version >= 1
