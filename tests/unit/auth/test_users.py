"""People one by one: who acts for a project without a group, and who is kept out whatever they are
in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from fabric.auth import GlobusTokens, Groups, Identity, Keys, Tickets, Users
from fabric.errors import (
    Duplicate,
    NotAMember,
    NotFound,
    RequestInvalid,
    TicketInvalid,
    UserBlocked,
)
from fabric.sql import Database
from fabric.testing.globus.campus import Campus

INTROSPECT = "/v2/oauth2/token/introspect"


def test_one_who_was_added_acts_for_the_project_without_a_group(
    campus: Campus, tokens: GlobusTokens, users: Users
) -> None:
    token = campus.token(campus.bob)
    with pytest.raises(NotAMember):
        tokens.authenticate(token)
    users.add("Bob@Example.edu", "bio", scopes=["query", "launch"], max_concurrent=5)
    tokens.recheck()
    found = tokens.authenticate(token)
    assert (found.project, found.scopes) == ("bio", frozenset({"query", "launch"}))
    assert (found.max_concurrent, found.groups) == (5, frozenset())
    users.modify("bob@example.edu", "bio", scopes=["query"])
    tokens.recheck()
    assert tokens.authenticate(token).scopes == frozenset({"query"})
    users.delete("bob@example.edu", "bio")
    tokens.recheck()
    assert tokens.recall(token) is None
    with pytest.raises(NotAMember):
        tokens.authenticate(token)


def test_what_one_was_added_for_adds_up_with_groups(
    campus: Campus, tokens: GlobusTokens, groups: Groups, users: Users
) -> None:
    users.add(campus.alice.id, "astro", scopes=["launch"], max_concurrent=2)
    users.add(f"globus:{campus.alice.id}", "bio")
    token = campus.token(campus.alice)
    mine = tokens.authenticate(token, "astro")
    assert (mine.scopes, mine.max_concurrent) == (frozenset({"query", "launch"}), 3)
    assert mine.projects == ("astro", "bio")
    assert tokens.authenticate(token, "bio").project == "bio"


@pytest.mark.parametrize("form", ["{id}", "globus:{id}", "alice@example.edu", "ALICE@example.EDU"])
def test_one_who_is_blocked_is_kept_out_until_let_in(
    campus: Campus, tokens: GlobusTokens, users: Users, form: str
) -> None:
    token = campus.token(campus.alice)
    tokens.authenticate(token)
    num_asked = campus.service.num_calls[INTROSPECT]
    name = form.format(id=campus.alice.id)
    users.block(name, reason="a stolen laptop")
    tokens.recheck()
    assert tokens.recall(token) is None
    for project in (None, "astro", "bio"):
        with pytest.raises(UserBlocked, match=r"'alice@example\.edu' is .*: a stolen laptop; ask"):
            tokens.authenticate(token, project)
    assert users.find_block([campus.alice.id]) is not None, "runs and batches have the UUID alone"
    users.unblock(name)
    tokens.recheck()
    assert tokens.authenticate(token).project == "astro"
    assert campus.service.num_calls[INTROSPECT] == num_asked, "Globus is not asked for that"


def test_one_who_logged_in_is_let_in_by_either_name(
    campus: Campus, tokens: GlobusTokens, users: Users
) -> None:
    token = campus.token(campus.alice)
    tokens.authenticate(token)
    users.block(campus.alice.id)
    assert users.unblock("alice@example.edu").user == campus.alice.id
    users.block("alice@example.edu")
    users.block(campus.alice.id)
    users.unblock(campus.alice.id)
    assert users.blocked() == []
    tokens.recheck()
    assert tokens.authenticate(token).project == "astro"


def test_another_identity_of_the_blocked_brings_no_group(
    campus: Campus, tokens: GlobusTokens, users: Users
) -> None:
    other = campus.directory.add_user("a.lice@lab.example", linked=[campus.alice.id])
    token = campus.token(other)
    assert tokens.authenticate(token).project == "astro"
    users.block("alice@example.edu")
    tokens.recheck()
    with pytest.raises(UserBlocked):
        tokens.authenticate(token)


def test_tickets_of_the_blocked_are_void(
    database: Database, campus: Campus, tokens: GlobusTokens, users: Users
) -> None:
    alice = tokens.authenticate(campus.token(campus.alice))
    key = Keys(database).add_key("astro")[0]
    other = Identity(key_id=key.id, project="astro", scopes=key.scopes, max_concurrent=1)
    tickets = Tickets(database)
    theirs, others = (tickets.add(one, "alpha")[1] for one in (alice, other))
    users.block("alice@example.edu")
    with pytest.raises(TicketInvalid):
        tickets.authenticate(theirs)
    assert tickets.authenticate(others).issued_by == key.id


@pytest.mark.parametrize(
    "name", ["", "*", "alice", "a@b@c", "alice@", "project:astro", "6c91", "x" * 65 + "@y"]
)
def test_what_names_nobody_is_refused(groups: Groups, users: Users, name: str) -> None:
    for act in (users.block, users.unblock, lambda one: users.add(one, "astro")):
        with pytest.raises(RequestInvalid, match=r"NAME@DOMAIN, or the UUID"):
            act(name)


def test_what_cannot_be_added_changes_nothing(groups: Groups, users: Users) -> None:
    users.add("carol@example.edu", "astro")
    with pytest.raises(Duplicate, match="carol@"):
        users.add("CAROL@example.edu", "astro")
    with pytest.raises(NotFound, match="'unheard-of'"):
        users.add("carol@example.edu", "unheard-of")
    with pytest.raises(RequestInvalid, match="may have admin, launch"):
        users.add("dave@example.edu", "astro", scopes=["site"])
    for number in (0, -1, 10**9):
        with pytest.raises(RequestInvalid, match="from 1 to"):
            users.modify("carol@example.edu", "astro", max_concurrent=number)
    with pytest.raises(NotFound):
        users.modify("dave@example.edu", "astro", max_concurrent=1)
    with pytest.raises(NotFound):
        users.delete("carol@example.edu", "bio")
    with pytest.raises(NotFound):
        users.unblock("carol@example.edu")
    users.block("carol@example.edu")
    with pytest.raises(Duplicate):
        users.block("carol@example.edu")
    assert [(one.user, one.max_concurrent) for one in users.users()] == [("carol@example.edu", 64)]


def test_a_deleted_project_takes_its_people_along(
    database: Database, groups: Groups, users: Users
) -> None:
    users.add("carol@example.edu", "astro")
    users.add("carol@example.edu", "bio")
    Keys(database).delete_project("astro")
    assert [one.project for one in users.users()] == ["bio"]
    Keys(database).add_project("astro")
    assert users.users("astro") == []


def test_a_login_is_noted_once_by_whoever_is_asked(users: Users) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: users.note_login("id-1", "old@example.edu"), range(32)))
    assert users.names() == {"id-1": "old@example.edu"}
    users.note_login("id-1", "new@example.edu")
    assert users.names() == {"id-1": "new@example.edu"}
