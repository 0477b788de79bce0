"""Whose Globus tokens the hub takes, for which projects, and for how long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fabric.auth import GlobusTokens, Groups, Identity
from fabric.auth.globus import CACHE_S, RETRY_AFTER_S, SKEW_S
from fabric.errors import (
    AuthUnavailable,
    FabricError,
    NotAMember,
    ProjectNotChosen,
    RequestInvalid,
    TokenExpired,
    TokenInvalid,
)
from fabric.testing.clock import Clock
from fabric.testing.globus.auth import GROUPS_SCOPE
from fabric.testing.globus.campus import Campus

INTROSPECT = "/v2/oauth2/token/introspect"


def test_member_of_one_group_acts_for_its_project(
    campus: Campus, tokens: GlobusTokens, clock: Clock
) -> None:
    assert tokens.authenticate(campus.token(campus.alice)) == Identity(
        key_id=f"globus:{campus.alice.id}",
        project="astro",
        scopes=frozenset({"query"}),
        max_concurrent=3,
        user="alice@example.edu",
        projects=("astro",),
        expires_at=clock.now + timedelta(hours=1),
        groups=frozenset({campus.survey.id}),
    )


def test_member_of_two_groups_chooses(campus: Campus, tokens: GlobusTokens) -> None:
    campus.directory.add_member(campus.lab, campus.alice)
    token = campus.token(campus.alice)
    with pytest.raises(ProjectNotChosen) as refused:
        tokens.authenticate(token)
    assert refused.value.detail["projects"] == ["astro", "bio"]
    for project in ("astro", "bio"):
        identity = tokens.authenticate(token, project)
        assert (identity.project, identity.projects) == (project, ("astro", "bio"))
        assert tokens.recall(token, project) == identity
    assert tokens.recall(token) is None


def test_groups_of_one_project_add_up(campus: Campus, tokens: GlobusTokens, groups: Groups) -> None:
    campus.directory.add_member(campus.lab, campus.alice)
    groups.delete(campus.lab.id, "bio")
    groups.add(campus.lab.id, "astro", scopes=["admin"], max_concurrent=9)
    identity = tokens.authenticate(campus.token(campus.alice))
    assert (identity.scopes, identity.max_concurrent) == (frozenset({"query", "admin"}), 9)


@pytest.mark.parametrize("status", ["pending", "invited", "removed"])
def test_membership_that_is_not_active_does_not_count(
    campus: Campus, tokens: GlobusTokens, status: str
) -> None:
    campus.directory.add_member(campus.survey, campus.bob, status=status)
    with pytest.raises(NotAMember):
        tokens.authenticate(campus.token(campus.bob))


def test_linked_identity_brings_its_groups(campus: Campus, tokens: GlobusTokens) -> None:
    other = campus.directory.add_user("a.lice@lab.example", linked=[campus.alice.id])
    assert tokens.authenticate(campus.token(other)).project == "astro"


def test_refusal_names_the_groups_that_globus_shows_to_the_caller(
    campus: Campus, tokens: GlobusTokens
) -> None:
    token = campus.token(campus.bob)
    with pytest.raises(NotAMember, match=r"bob@.*Astro survey") as refused:
        tokens.authenticate(token)
    assert refused.value.detail["groups"] == ["Astro survey", campus.lab.id]
    with pytest.raises(NotAMember, match="'bio'") as refused:
        tokens.authenticate(token, "bio")
    assert refused.value.detail["groups"] == [campus.lab.id]
    with pytest.raises(NotAMember, match="ask an administrator"):
        tokens.authenticate(token, "unheard-of")


def test_member_of_one_project_is_refused_in_another(campus: Campus, tokens: GlobusTokens) -> None:
    with pytest.raises(NotAMember, match="'bio'"):
        tokens.authenticate(campus.token(campus.alice), "bio")


@pytest.mark.parametrize("bearer", ["x", "a b" * 10, "Ag" + "0" * 5000, "ключ" * 10, "fab-" * 4])
def test_what_is_no_token_is_refused_without_asking(
    campus: Campus, tokens: GlobusTokens, bearer: str
) -> None:
    with pytest.raises(TokenInvalid):
        tokens.authenticate(bearer)
    assert campus.service.num_calls == {}


def bad_tokens(campus: Campus) -> dict[str, tuple[str, type[FabricError]]]:
    revoked = campus.token(campus.alice)
    campus.directory.revoke(revoked)
    transfer = "urn:globus:auth:scope:transfer.api.globus.org:all"
    narrow = campus.directory.add_scope(campus.hub, "other", dependencies=[GROUPS_SCOPE])
    own = campus.directory.issue(
        "access",
        campus.alice.id,
        campus.hub.id,
        GROUPS_SCOPE,
        resource_server="groups.api.globus.org",
    )
    return {
        "made up": ("Ag" + "0" * 92, TokenExpired),
        "revoked": (revoked, TokenExpired),
        "for another service": (
            campus.token(campus.alice, transfer, server="transfer.api.globus.org"),
            TokenExpired,
        ),
        "for the hub, another scope": (campus.token(campus.alice, narrow), TokenInvalid),
        "issued to the hub itself, for groups": (own.value, TokenInvalid),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("made up", "revoked", "for another service"),
        *("for the hub, another scope", "issued to the hub itself, for groups"),
    ],
)
def test_token_that_is_not_a_login_here_is_refused(
    campus: Campus, tokens: GlobusTokens, name: str
) -> None:
    token, error = bad_tokens(campus)[name]
    with pytest.raises(error) as refused:
        tokens.authenticate(token)
    assert refused.value.http_status == 401
    assert tokens.recall(token) is None


def test_active_token_of_another_audience_is_refused(
    campus: Campus, tokens: GlobusTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should Globus Auth ever vouch for tokens of other services, the hub still looks."""
    other = campus.directory.add_client("another service")
    token = campus.token(campus.alice, server=other.id)
    monkeypatch.setattr(tokens, "_client_id", other.id)
    monkeypatch.setattr(tokens, "_client_secret", other.secret)
    client = tokens._auth_client()
    monkeypatch.setattr(tokens, "_client_id", campus.hub.id)
    assert client.oauth2_token_introspect(token)["active"] is True
    with pytest.raises(TokenInvalid, match="another service"):
        tokens.authenticate(token)


def test_expired_token_is_refused_also_when_it_is_known(
    campus: Campus, tokens: GlobusTokens, clock: Clock
) -> None:
    campus.directory.token_lifetime_s = CACHE_S / 2
    token = campus.token(campus.alice)
    tokens.authenticate(token)
    clock.advance(CACHE_S / 2)
    assert tokens.recall(token) is None
    with pytest.raises(TokenExpired):
        tokens.authenticate(token)


@pytest.mark.parametrize("off_s", [-SKEW_S + 1, SKEW_S - 1])
def test_clocks_may_be_a_minute_apart(
    campus: Campus, tokens: GlobusTokens, clock: Clock, off_s: float
) -> None:
    """The hub's clock is ahead near the token's end, or behind at its beginning."""
    campus.directory.token_lifetime_s = 1.0
    campus.directory.clock = lambda: clock.now.timestamp() - off_s
    assert tokens.authenticate(campus.token(campus.alice)).project == "astro"


@pytest.mark.parametrize(
    ("off_s", "error"), [(-SKEW_S - 5, TokenInvalid), (SKEW_S + 5, TokenExpired)]
)
def test_clocks_further_apart_are_noticed(
    campus: Campus, tokens: GlobusTokens, clock: Clock, off_s: float, error: type[FabricError]
) -> None:
    campus.directory.token_lifetime_s = 1.0
    campus.directory.clock = lambda: clock.now.timestamp() - off_s
    with pytest.raises(error):
        tokens.authenticate(campus.token(campus.alice))


def test_known_caller_is_answered_without_globus_even_if_it_is_down(
    campus: Campus, tokens: GlobusTokens, clock: Clock
) -> None:
    token = campus.token(campus.alice)
    identity = tokens.authenticate(token)
    campus.service.stop()
    clock.advance(CACHE_S - 1)
    assert tokens.recall(token) == tokens.authenticate(token) == identity
    with pytest.raises(NotAMember) as refused:
        tokens.authenticate(token, "bio")
    assert refused.value.detail["groups"] == [campus.lab.id]
    clock.advance(1 + RETRY_AFTER_S)
    with pytest.raises(AuthUnavailable) as unavailable:
        tokens.authenticate(token)
    assert unavailable.value.http_status == 503
    assert unavailable.value.detail["retry_after_s"] == RETRY_AFTER_S


def test_globus_is_asked_again_once_it_is_back(
    campus: Campus, tokens: GlobusTokens, clock: Clock
) -> None:
    token = campus.token(campus.alice)
    campus.service.stop()
    with pytest.raises(AuthUnavailable):
        tokens.authenticate(token)
    campus.service.start()
    clock.advance(RETRY_AFTER_S / 2)
    with pytest.raises(AuthUnavailable):
        tokens.authenticate(token)
    assert campus.service.num_calls == {}
    clock.advance(RETRY_AFTER_S / 2)
    assert tokens.authenticate(token).project == "astro"


def test_revoked_token_lives_on_for_a_minute_at_most(
    campus: Campus, tokens: GlobusTokens, clock: Clock
) -> None:
    token = campus.token(campus.alice)
    tokens.authenticate(token)
    campus.directory.revoke(token)
    clock.advance(CACHE_S - 1)
    tokens.authenticate(token)
    clock.advance(1)
    assert tokens.recall(token) is None
    with pytest.raises(TokenExpired):
        tokens.authenticate(token)


def test_left_group_and_deleted_mapping_count_within_a_minute(
    campus: Campus, tokens: GlobusTokens, groups: Groups, clock: Clock
) -> None:
    token = campus.token(campus.alice)
    tokens.authenticate(token)
    campus.directory.remove_member(campus.survey, campus.alice)
    clock.advance(CACHE_S)
    with pytest.raises(NotAMember):
        tokens.authenticate(token)
    campus.directory.add_member(campus.survey, campus.alice)
    clock.advance(CACHE_S)
    tokens.authenticate(token)
    groups.delete(campus.survey.id, "astro")
    clock.advance(CACHE_S)
    with pytest.raises(NotAMember):
        tokens.authenticate(token)


def test_a_changed_mapping_counts_without_a_question_to_globus(
    campus: Campus, tokens: GlobusTokens, groups: Groups
) -> None:
    token = campus.token(campus.alice)
    tokens.authenticate(token)
    num_asked = campus.service.num_calls[INTROSPECT]
    groups.add(campus.survey.id, "bio")
    assert tokens.recall(token) is not None, "nobody has told it yet"
    tokens.recheck()
    assert tokens.recall(token, "bio") is None
    assert tokens.authenticate(token, "bio").project == "bio"
    groups.delete(campus.survey.id, "astro")
    tokens.recheck()
    assert tokens.authenticate(token).project == "bio"
    assert campus.service.num_calls[INTROSPECT] == num_asked


def test_known_caller_costs_globus_nothing(campus: Campus, tokens: GlobusTokens) -> None:
    token = campus.token(campus.alice)
    for _ in range(5):
        tokens.authenticate(token)
        tokens.recall(token)
    assert campus.service.num_calls[INTROSPECT] == 1
    assert sum(campus.service.num_calls.values()) == 3


def test_wrong_credentials_of_the_hub_are_told_from_a_wrong_token(
    campus: Campus,
    tokens: GlobusTokens,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tokens, "_client_secret", "wrong")
    with pytest.raises(AuthUnavailable, match="own credentials"):
        tokens.authenticate(campus.token(campus.alice))
    assert "client id and secret" in caplog.text


def test_scope_without_the_groups_dependency_is_told(campus: Campus, tokens: GlobusTokens) -> None:
    campus.directory.add_scope(campus.hub, dependencies=[])
    with pytest.raises(TokenInvalid, match="group memberships"):
        tokens.authenticate(campus.token(campus.alice))


@pytest.mark.parametrize("act", ["good", "refused", "revoked", "down"], ids=lambda act: str(act))
def test_tokens_are_nowhere_but_in_the_request(
    campus: Campus,
    tokens: GlobusTokens,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    act: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    token = campus.token(campus.bob if act == "refused" else campus.alice)
    if act == "revoked":
        campus.directory.revoke(token)
    if act == "down":
        campus.service.stop()
    error: BaseException | None = None
    try:
        tokens.authenticate(token)
    except FabricError as raised:
        error = raised
    assert (error is None) == (act == "good")
    issued = [grant.value for grant in campus.directory.grants()]
    canaries = [token, campus.hub.secret, *issued]
    told = [caplog.text, repr(vars(tokens))]
    while error is not None:
        told.append(repr(error) + repr(vars(error)))
        error = error.__cause__ if isinstance(error, FabricError) else None
    written = b"".join(path.read_bytes() for path in tmp_path.glob("fabric.db*"))
    assert "oauth2/token" in caplog.text
    for canary in canaries:
        if canary != campus.hub.secret:
            assert not any(canary in text for text in told)
        assert canary not in caplog.text
        assert canary.encode() not in written


@pytest.mark.parametrize(
    "fields",
    [
        {"group_id": "physicists"},
        {"scopes": ["site"]},
        {"scopes": ["query", "root"]},
        {"max_concurrent": 0},
    ],
)
def test_group_that_makes_no_sense_is_refused(groups: Groups, fields: dict[str, Any]) -> None:
    before = groups.groups()
    with pytest.raises(FabricError) as refused:
        groups.add(**{"group_id": str(uuid4()), "project": "astro", **fields})
    assert isinstance(refused.value, RequestInvalid)
    assert groups.groups() == before


def test_groups_are_kept_by_project(groups: Groups, campus: Campus) -> None:
    assert [(one.group_id, one.project) for one in groups.groups()] == [
        (campus.survey.id, "astro"),
        (campus.lab.id, "bio"),
    ]
    with pytest.raises(FabricError, match="already a group"):
        groups.add(campus.survey.id.upper(), "astro")
    with pytest.raises(FabricError, match="no project"):
        groups.add(campus.survey.id, "absent")
    deleted = groups.delete(campus.survey.id, "astro")
    assert deleted not in groups.groups()
    with pytest.raises(FabricError, match="There is no group"):
        groups.delete(campus.survey.id, "astro")


def test_another_hub_process_knows_nothing_of_the_first_ones_answers(
    campus: Campus, make_tokens: Callable[[], GlobusTokens]
) -> None:
    token = campus.token(campus.alice)
    make_tokens().authenticate(token)
    assert make_tokens().recall(token) is None
