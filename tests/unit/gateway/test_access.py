"""Every route declares what it needs, and nothing else gets in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute, APIWebSocketRoute

from fabric.gateway import app as gateway_app
from fabric.gateway.access import Needs, NeedsLaunch, Public, declarations, undeclared
from fabric.testing.hub import RunningHub

ROUTES = [route for router in gateway_app.ROUTERS for route in router.routes]
PUBLIC = {"/healthz", "/openapi.json"}


def test_every_route_declares_what_it_needs() -> None:
    assert len(ROUTES) > 15
    assert undeclared(ROUTES) == []


def test_only_the_named_routes_are_public() -> None:
    public = {
        route.path
        for route in ROUTES
        if isinstance(route, APIRoute | APIWebSocketRoute)
        and isinstance(declarations(route)[0], Public)
    }
    assert public == PUBLIC


def test_an_app_with_an_undeclared_route_is_not_built(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = APIRouter()
    router.add_api_route("/secret", lambda: None)
    monkeypatch.setattr(gateway_app, "ROUTERS", (*gateway_app.ROUTERS, router))
    rooms: Any = dict.fromkeys(("broker", "catalog", "keys", "ledger", "offload", "metrics"))
    with pytest.raises(RuntimeError, match="/secret"):
        gateway_app.create_app(**rooms)


def test_a_route_that_declares_twice_is_found() -> None:
    router = APIRouter(dependencies=[Depends(Public())])
    router.add_api_route("/twice", lambda: None, dependencies=[Depends(Needs("admin"))])
    assert undeclared(router.routes) == ["/twice"]


def test_an_unknown_scope_cannot_be_declared() -> None:
    with pytest.raises(ValueError, match="root"):
        Needs("root")


def keyed_calls() -> list[tuple[str, str]]:
    """Return method and path of every route that needs a key."""
    calls = []
    for route in ROUTES:
        if isinstance(route, APIRoute) and not isinstance(declarations(route)[0], Public):
            path = route.path.replace("{name:path}", "x").replace("{", "").replace("}", "")
            calls.append((next(iter(route.methods)), path))
    return [call for call in calls if call[1] != "/metrics"]


@pytest.mark.parametrize(("method", "path"), keyed_calls())
def test_no_route_answers_without_a_valid_key(hub: RunningHub, method: str, path: str) -> None:
    with httpx.Client(base_url=hub.base_url) as client:
        for header, code in [
            (None, "missing_api_key"),
            ("Basic dTpw", "missing_api_key"),
            ("Bearer", "missing_api_key"),
            ("Bearer wrong", "invalid_api_key"),
            (f"Bearer {hub.api_key[:-1]}{'a' if hub.api_key[-1] != 'a' else 'b'}", None),
        ]:
            headers = {} if header is None else {"authorization": header}
            reply = client.request(method, path, headers=headers, json={})
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"
            assert reply.json()["error"]["code"] == code or code is None
            assert reply.headers["www-authenticate"] == "Bearer"


def test_expired_and_revoked_keys_are_told_apart(hub: RunningHub) -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    _, expired = hub.keys.add_key("physics", expires_at=past)
    record, revoked = hub.keys.add_key("physics")
    with httpx.Client(base_url=hub.base_url) as client:

        def code(key: str) -> object:
            reply = client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            return reply.json().get("error", {}).get("code")

        assert code(expired) == "expired_api_key"
        assert code(revoked) is None
        hub.keys.revoke(record.id)
        assert code(revoked) == "invalid_api_key"


@pytest.mark.parametrize(
    ("scope", "path", "allowed"),
    [
        ("query", "/v1/models", True),
        ("admin", "/v1/models", False),
        ("admin", "/v1/fabric/whoami", True),
        ("query", "/v1/fabric/runs", True),
        ("site", "/v1/fabric/runs", False),
    ],
)
def test_scopes_do_not_imply_each_other(
    hub: RunningHub, scope: str, path: str, allowed: bool
) -> None:
    site = "alpha" if scope == "site" else None
    _, key = hub.keys.add_key("physics", scopes=[scope], site=site)
    reply = httpx.get(hub.base_url + path, headers={"authorization": f"Bearer {key}"})
    assert reply.status_code == (200 if allowed else 403)
    if not allowed:
        assert reply.json()["error"]["code"] == "permission_denied"


def test_the_session_route_needs_a_launch() -> None:
    [route] = [r for r in ROUTES if isinstance(r, APIWebSocketRoute)]
    assert isinstance(declarations(route)[0], NeedsLaunch)
