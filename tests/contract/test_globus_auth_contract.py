"""The stand-in of Globus Auth and Groups answers as globus-sdk's own fixtures do.

Each fixture of ``globus_sdk.testing`` is a recorded answer of the hosted service. The stand-in is
asked through the same client, and its answer must have at least the fixture's fields, of the same
types, where the answer is of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import globus_sdk
import httpx
import pytest
from globus_sdk.testing import get_response_set

from fabric.testing.globus.auth import GROUPS_SCOPE
from fabric.testing.globus.campus import Campus, running_campus

OPENID = "openid profile email"


@pytest.fixture(scope="module")
def campus() -> Iterator[Campus]:
    with running_campus() as campus:
        yield campus


@pytest.fixture
def native(campus: Campus) -> Iterator[globus_sdk.NativeAppAuthClient]:
    with globus_sdk.NativeAppAuthClient(campus.app.id, base_url=campus.service.url) as client:
        yield client


@pytest.fixture
def hub(campus: Campus) -> Iterator[globus_sdk.ConfidentialAppAuthClient]:
    with globus_sdk.ConfidentialAppAuthClient(
        campus.hub.id, campus.hub.secret, base_url=campus.service.url
    ) as client:
        yield client


def recorded(name: str, case: str = "default") -> Any:
    return get_response_set(name).lookup(case).json


def assert_like(answer: Any, fixture: Any, where: str = "") -> None:
    """Fail where the fixture has what the answer lacks or has in another type."""
    if isinstance(fixture, dict):
        assert isinstance(answer, dict), where
        for name, value in fixture.items():
            assert name in answer, f"{where}.{name}"
            assert_like(answer[name], value, f"{where}.{name}")
    elif isinstance(fixture, list):
        assert isinstance(answer, list), where
        for item in answer[:1]:
            if fixture:
                assert_like(item, fixture[0], f"{where}[0]")
    elif answer is not None and fixture is not None:
        assert type(answer) is type(fixture), f"{where}: {answer!r} and {fixture!r}"


def log_in(
    campus: Campus, native: globus_sdk.NativeAppAuthClient, scope: str, *, refresh: bool = False
) -> globus_sdk.OAuthTokenResponse:
    native.oauth2_start_flow(scope, refresh_tokens=refresh)
    code = campus.service.browse(native.oauth2_get_authorize_url(), campus.alice)
    return native.oauth2_exchange_code_for_tokens(code)


@pytest.mark.parametrize(("scope", "case"), [(None, "default"), ("openid", "openid")])
def test_client_credentials(
    hub: globus_sdk.ConfidentialAppAuthClient, scope: str | None, case: str
) -> None:
    answer = hub.oauth2_client_credentials_tokens(
        scope or "urn:globus:auth:scope:transfer.api.globus.org:all"
    )
    fixture = recorded("auth.oauth2_client_credentials_tokens", case)
    assert_like(answer.data, fixture)
    assert answer["resource_server"] == fixture["resource_server"]
    assert answer["expires_in"] <= fixture["expires_in"]


@pytest.mark.parametrize(
    ("scope", "case"),
    [("urn:globus:auth:scope:transfer.api.globus.org:all", "default"), ("openid", "openid")],
)
def test_code_of_a_native_app(
    campus: Campus, native: globus_sdk.NativeAppAuthClient, scope: str, case: str
) -> None:
    answer = log_in(campus, native, scope)
    assert_like(answer.data, recorded("auth.oauth2_exchange_code_for_tokens", case))
    if case == "openid":
        assert answer.decode_id_token()["sub"] == campus.alice.id


def test_code_counts_once_and_only_with_its_verifier(
    campus: Campus, native: globus_sdk.NativeAppAuthClient
) -> None:
    fixture = get_response_set("auth.oauth2_exchange_code_for_tokens").lookup("invalid_grant")
    native.oauth2_start_flow(OPENID)
    url = native.oauth2_get_authorize_url()
    spent = campus.service.browse(url, campus.alice)
    native.oauth2_exchange_code_for_tokens(spent)
    stolen = campus.service.browse(url, campus.alice)
    for code, restart in (("made up", False), (spent, False), (stolen, True)):
        if restart:
            native.oauth2_start_flow(OPENID)
        with pytest.raises(globus_sdk.AuthAPIError) as refused:
            native.oauth2_exchange_code_for_tokens(code)
        assert refused.value.http_status == fixture.status
        assert refused.value.raw_json["error"] == fixture.json["error"]


def test_authorize_refuses_what_globus_would_not_show(
    campus: Campus, native: globus_sdk.NativeAppAuthClient
) -> None:
    native.oauth2_start_flow(OPENID)
    url = native.oauth2_get_authorize_url()
    assert httpx.get(url).status_code == 401
    for bad in (
        url.replace("S256", "plain"),
        url.replace(campus.app.id, "0"),
        url.replace("openid", "nonsense"),
        url.replace("redirect_uri", "redirect"),
    ):
        assert httpx.get(f"{bad}&login_as={campus.alice.username}").status_code == 400


def test_refresh(campus: Campus, native: globus_sdk.NativeAppAuthClient) -> None:
    first = log_in(campus, native, f"openid {campus.scope}", refresh=True)
    assert set(first.by_resource_server) == {"auth.globus.org", campus.hub.id}
    token = first.by_resource_server[campus.hub.id]
    answer = native.oauth2_refresh_token(token["refresh_token"])
    renewed = answer.by_resource_server
    assert list(renewed) == [campus.hub.id]
    assert renewed[campus.hub.id]["access_token"] != token["access_token"]
    native.oauth2_revoke_token(token["refresh_token"])
    with pytest.raises(globus_sdk.AuthAPIError) as refused:
        native.oauth2_refresh_token(token["refresh_token"])
    assert refused.value.raw_json["error"] == "invalid_grant"


@pytest.mark.parametrize("case", ["groups", "groups_with_refresh_token"])
def test_dependent_tokens(
    campus: Campus, hub: globus_sdk.ConfidentialAppAuthClient, case: str
) -> None:
    answer = hub.oauth2_get_dependent_tokens(
        campus.token(campus.alice), refresh_tokens=case != "groups"
    )
    fixture = recorded("auth.oauth2_get_dependent_tokens", case)
    assert_like(answer.data, fixture)
    assert answer[0]["scope"] == fixture[0]["scope"] == GROUPS_SCOPE


def test_dependent_tokens_need_a_token_for_the_caller_and_a_consent(
    campus: Campus, hub: globus_sdk.ConfidentialAppAuthClient
) -> None:
    other = campus.directory.add_scope(campus.hub, "lonely")
    for token, status in (
        ("made up", 400),
        (campus.token(campus.alice, server="another"), 400),
        (campus.token(campus.alice, other), 403),
    ):
        with pytest.raises(globus_sdk.AuthAPIError) as refused:
            hub.oauth2_get_dependent_tokens(token, scope=GROUPS_SCOPE)
        assert refused.value.http_status == status
    assert hub.oauth2_get_dependent_tokens(campus.token(campus.alice, other)).data == []


def test_introspection(campus: Campus, hub: globus_sdk.ConfidentialAppAuthClient) -> None:
    answer = hub.oauth2_token_introspect(campus.token(campus.alice), include="identity_set")
    assert_like(answer.data, recorded("auth.oauth2_token_introspect"))
    assert answer["aud"] == [campus.hub.id, campus.app.id]
    assert answer["identity_set"] == [campus.alice.id]
    foreign = campus.token(campus.alice, server="transfer.api.globus.org")
    for token in (foreign, "made up"):
        assert hub.oauth2_token_introspect(token).data == {"active": False}


def test_introspection_needs_the_clients_secret(campus: Campus) -> None:
    for secret in ("wrong", "", campus.app.id):
        with (
            globus_sdk.ConfidentialAppAuthClient(
                campus.hub.id, secret, base_url=campus.service.url
            ) as client,
            pytest.raises(globus_sdk.AuthAPIError) as refused,
        ):
            client.oauth2_token_introspect("x")
        assert refused.value.http_status == 401


def test_revocation(campus: Campus, native: globus_sdk.NativeAppAuthClient) -> None:
    token = log_in(campus, native, OPENID)["access_token"]
    answer = native.oauth2_revoke_token(token)
    assert answer.data == recorded("auth.oauth2_revoke_token")
    assert campus.directory.identity_of(token) is None


def test_nobody_revokes_anothers_token(
    campus: Campus, hub: globus_sdk.ConfidentialAppAuthClient
) -> None:
    token = campus.token(campus.alice)
    hub.oauth2_revoke_token(token)
    assert campus.directory.identity_of(token) == campus.alice


@pytest.mark.parametrize(("token", "case"), [("none", "unauthorized"), ("other", "forbidden")])
def test_userinfo_refusals(campus: Campus, token: str, case: str) -> None:
    fixture = get_response_set("auth.userinfo").lookup(case)
    view = "urn:globus:auth:scope:auth.globus.org:view_identities"
    value = "x" if token == "none" else campus.token(campus.alice, view, server="auth.globus.org")
    with (
        globus_sdk.AuthClient(
            authorizer=globus_sdk.AccessTokenAuthorizer(value), base_url=campus.service.url
        ) as client,
        pytest.raises(globus_sdk.AuthAPIError) as refused,
    ):
        client.userinfo()
    assert refused.value.http_status == fixture.status
    assert refused.value.code == fixture.json["errors"][0]["code"]
    assert_like(refused.value.raw_json, fixture.json)


def test_userinfo_and_identities(campus: Campus) -> None:
    token = campus.token(campus.alice, "openid", server="auth.globus.org")
    with globus_sdk.AuthClient(
        authorizer=globus_sdk.AccessTokenAuthorizer(token), base_url=campus.service.url
    ) as client:
        info = client.userinfo()
        assert (info["sub"], info["preferred_username"]) == (
            campus.alice.id,
            campus.alice.username,
        )
        found = client.get_identities(ids=[campus.alice.id])
        assert_like(found.data, recorded("auth.get_identities"))
        assert client.get_identities(usernames="nobody@example.edu").data == recorded(
            "auth.get_identities", "empty"
        )
        both = client.get_identities(usernames=[campus.alice.username, campus.bob.username])
        assert len(both["identities"]) == 2


def test_groups(campus: Campus) -> None:
    def ask(account: Any) -> globus_sdk.GroupsClient:
        token = campus.token(account, GROUPS_SCOPE, server="groups.api.globus.org")
        return globus_sdk.GroupsClient(
            authorizer=globus_sdk.AccessTokenAuthorizer(token), base_url=campus.service.url
        )

    with ask(campus.alice) as client:
        mine = client.get_my_groups()
        assert_like(list(mine), recorded("groups.get_my_groups"))
        assert [group["id"] for group in mine] == [campus.survey.id]
        assert_like(client.get_group(campus.survey.id).data, recorded("groups.get_group"))
    with ask(campus.bob) as client:
        assert list(client.get_my_groups()) == []
        assert client.get_group(campus.survey.id)["my_memberships"] == []
        for group, status in ((campus.lab.id, 403), (campus.alice.id, 404)):
            with pytest.raises(globus_sdk.GroupsAPIError) as refused:
                client.get_group(group)
            assert refused.value.http_status == status


def test_unknown_scope_and_grant_are_refused(hub: globus_sdk.ConfidentialAppAuthClient) -> None:
    for scope in ("nonsense", "https://auth.globus.org/scopes/unknown/all"):
        with pytest.raises(globus_sdk.AuthAPIError) as refused:
            hub.oauth2_client_credentials_tokens(scope)
        assert refused.value.http_status == 400
    with pytest.raises(globus_sdk.AuthAPIError):
        hub.oauth2_token({"grant_type": "password"})
