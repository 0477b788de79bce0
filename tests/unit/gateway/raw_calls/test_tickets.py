"""Tickets over HTTP: issued, listed, revoked, and good for nothing else."""

from __future__ import annotations

import httpx
import pytest

from fabric.testing.hub import PROJECT, RunningHub
from fabric.testing.raw_calls import issue


def test_a_ticket_is_shown_once_listed_and_revoked(client: httpx.Client) -> None:
    body = {"site": "alpha", "ttl_s": 600, "max_usu": 5}
    issued = client.post("/v1/fabric/tickets", json=body).json()
    assert (issued["site"], issued["project"], issued["max_usu"]) == ("alpha", PROJECT, 5)
    listed = client.get("/v1/fabric/tickets")
    assert issued["ticket"] not in listed.text
    assert [one["id"] for one in listed.json()["data"]] == [issued["id"]]
    assert client.delete(f"/v1/fabric/tickets/{issued['id']}").json()["revoked_at"]
    assert client.get("/v1/fabric/tickets").json()["data"] == []
    assert client.delete("/v1/fabric/tickets/000000000000").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"site": "gamma"}, 404, "site"),
        ({}, 400, "site"),
        ({"site": "alpha", "ttl_s": 86_401}, 400, "ttl_s"),
        ({"site": "alpha", "ttl_s": 0}, 400, "ttl_s"),
        ({"site": "alpha", "max_usu": 0}, 400, "max_usu"),
        ({"site": "alpha", "project": "other"}, 400, "project"),
    ],
)
def test_what_a_ticket_cannot_be_is_named(
    client: httpx.Client, body: dict[str, object], status: int, param: str
) -> None:
    reply = client.post("/v1/fabric/tickets", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


def test_a_ticket_opens_no_route(hub: RunningHub, client: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {issue(client)}"}
    for method, path in (
        ("GET", "/v1/fabric/whoami"),
        ("GET", "/v1/fabric/usage"),
        ("POST", "/v1/fabric/tickets"),
        ("POST", "/v1/completions"),
    ):
        reply = httpx.request(method, hub.base_url + path, headers=headers, json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_without_the_scope_gets_none(hub: RunningHub) -> None:
    _, key = hub.keys.add_key(PROJECT, scopes=("admin",))
    headers = {"authorization": f"Bearer {key}"}
    reply = httpx.post(f"{hub.base_url}/v1/fabric/tickets", headers=headers, json={"site": "alpha"})
    assert reply.status_code == 403
