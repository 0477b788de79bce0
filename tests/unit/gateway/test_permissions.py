"""Private models and sites over HTTP: who sees them, for what, and how soon that ends."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from fabric.auth import PROGRAM_SCOPES, Grant, Keys
from fabric.sql import Database
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

SECRET = "secret"
COMPLETION: dict[str, Any] = {"model": SECRET, "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        digest = hub.catalog.resolve(MODEL).digest
        hub.catalog.add_model(SECRET, "1", context_tokens=2048, source="x:", digest=digest)
        yield hub


@pytest.fixture(autouse=True)
def private(hub: RunningHub) -> Iterator[None]:
    """The model is private and nobody has a grant; hubs know of it."""
    hub.grants.close("model", SECRET)
    settle(hub)
    yield
    for grant in hub.grants.grants():
        hub.grants.delete(grant.id)
    for kind, name in hub.grants.private():
        hub.grants.open(kind, name)
    for limit in hub.grants.limits():
        hub.grants.delete_limit(limit.subject)
    settle(hub)


def settle(hub: RunningHub) -> None:
    """Let the hub act at once by what was written last; that it does so soon has its own tests."""

    async def ask() -> None:
        hub.broker.rules.forget()
        await hub.broker.rules.current()

    hub.call(ask())


def grant(hub: RunningHub, subject: str = f"project:{PROJECT}", **what: Any) -> Grant:
    made = hub.grants.add(subject, **{"model": SECRET, **what})
    settle(hub)
    return made


def asked(client: httpx.Client, body: dict[str, Any] = COMPLETION, **ours: Any) -> tuple[int, str]:
    reply = client.post("/v1/completions", json=body | ({"fabric": ours} if ours else {}))
    return reply.status_code, reply.json().get("error", {}).get("code", "")


def test_a_private_model_is_not_there_until_it_is_granted(
    hub: RunningHub, client: httpx.Client
) -> None:
    assert asked(client) == (404, "model_not_found")
    assert SECRET not in client.get("/v1/models").text
    made = grant(hub)
    assert asked(client) == (200, "")
    assert SECRET in client.get("/v1/models").text
    hub.grants.delete(made.id)
    taken_s = time.monotonic()
    while asked(client)[0] != 404:
        assert time.monotonic() - taken_s < 20
    assert SECRET not in client.get("/v1/fabric/models").text


def test_a_key_may_have_what_its_project_has_not(hub: RunningHub, client: httpx.Client) -> None:
    record, key = hub.keys.add_key(PROJECT)
    grant(hub, f"key:{record.id}")
    assert asked(client) == (404, "model_not_found")
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=20) as other:
        assert asked(other) == (200, "")


def test_another_mode_tier_or_site_is_refused_by_name(
    hub: RunningHub, client: httpx.Client
) -> None:
    grant(hub, site="alpha", modes=["query"], tiers=["standard"])
    assert asked(client) == (200, "")
    assert asked(client, tier="interactive") == (403, "not_granted")
    assert asked(client, sites=["beta"]) == (403, "not_granted")
    embeddings = client.post("/v1/embeddings", json={"model": SECRET, "input": "x"})
    error = embeddings.json()["error"]
    assert (embeddings.status_code, error["code"]) == (403, "not_granted")
    assert (error["detail"]["modes"], error["type"]) == (["embed"], "permission_error")
    explained = client.post("/v1/fabric/explain", json=COMPLETION).json()
    assert explained["site"] == "alpha"


def test_a_request_never_runs_where_its_model_was_not_granted(
    hub: RunningHub, client: httpx.Client
) -> None:
    grant(hub, site="beta")
    sites = {
        client.post("/v1/completions", json=COMPLETION).headers["x-fabric-site"] for _ in range(12)
    }
    assert sites == {"beta"}


def test_data_of_a_project_stays_where_it_may_go(hub: RunningHub, client: httpx.Client) -> None:
    grant(hub)
    open_to_all = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    hub.keys.modify_project(PROJECT, sites=["beta", "elsewhere"])
    settle(hub)
    try:
        for body in (COMPLETION, open_to_all):
            sites = {
                client.post("/v1/completions", json=body).headers["x-fabric-site"] for _ in range(8)
            }
            assert sites == {"beta"}
            for ours in ({"sites": ["alpha"]}, {"policy": "local-only", "data_site": "alpha"}):
                refused = client.post("/v1/completions", json=body | {"fabric": ours})
                assert refused.status_code in (403, 503), refused.text
                assert "x-fabric-site" not in refused.headers
        error = client.post(
            "/v1/completions", json=open_to_all | {"fabric": {"sites": ["alpha"]}}
        ).json()["error"]
        assert (error["code"], error["detail"]["homes"]) == ("data_stays", ["beta"])
        assert "may go to beta alone, not to alpha" in error["message"]
        explained = client.post("/v1/fabric/explain", json=open_to_all).json()
        assert {one["site"] for one in explained["candidates"] if not one["excluded"]} == {"beta"}
        ticket = client.post("/v1/fabric/tickets", json={"site": "alpha"})
        assert (ticket.status_code, ticket.json()["error"]["code"]) == (403, "data_stays")
        assert client.post("/v1/fabric/tickets", json={"site": "beta"}).status_code == 200
    finally:
        hub.keys.modify_project(PROJECT, sites=[])
        settle(hub)
    assert asked(client, open_to_all, sites=["alpha"]) == (200, "")


def test_a_program_needs_a_grant_of_each_of_its_modes(hub: RunningHub) -> None:
    _, key = hub.keys.add_key(PROJECT, scopes=PROGRAM_SCOPES)
    nodes = [
        {"op": "read", "at": "layers.1.out"},
        {"op": "write", "at": "layers.1.out", "mode": "scale", "alpha": 0.0},
        {"op": "save", "name": "h", "x": 0},
    ]
    body = {"model": SECRET, "program": {"runs": [{"id": "a", "ids": [1, 2], "nodes": nodes}]}}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=20) as client:
        made = grant(hub, modes=["read"])
        refused = client.post("/v1/fabric/programs", json=body)
        assert refused.status_code == 403, refused.text
        assert refused.json()["error"]["detail"]["modes"] == ["read", "write"]
        hub.grants.modify(made.id, modes=["read", "write"])
        settle(hub)
        assert client.post("/v1/fabric/programs", json=body).status_code == 200


def test_instances_of_a_private_model_need_a_grant_to_launch(hub: RunningHub) -> None:
    _, key = hub.keys.add_key(PROJECT, scopes=["launch"])
    body = {"model": SECRET, "machine": "laptop"}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=20) as client:

        def launched() -> int:
            return client.post("/v1/fabric/instances", json=body).status_code

        made = grant(hub, modes=["query"])
        assert launched() == 403
        hub.grants.modify(made.id, modes=["query", "launch"])
        settle(hub)
        assert launched() == 200


def test_a_site_may_not_run_a_private_model_that_nobody_uses_there(hub: RunningHub) -> None:
    grant(hub, site="alpha")
    replies = []
    for site in ("alpha", "beta"):
        _, key = hub.keys.add_key(PROJECT, scopes=["site"], site=site)
        headers = {"authorization": f"Bearer {key}"}
        body = {"site": site, "model": SECRET}
        url = f"{hub.base_url}/v1/fabric/launches"
        replies.append(httpx.post(url, json=body, headers=headers))
    assert [reply.status_code for reply in replies] == [200, 404]
    unheard = httpx.post(url, json={"site": "beta", "model": "unheard"}, headers=headers)
    assert replies[1].text.replace(SECRET, "*") == unheard.text.replace("unheard", "*")
    assert MODEL in unheard.text


def test_a_private_site_is_in_nobodys_table(hub: RunningHub, client: httpx.Client) -> None:
    hub.grants.close("site", "beta")
    settle(hub)
    public = COMPLETION | {"model": MODEL}
    assert "beta" not in client.post("/v1/fabric/explain", json=public).text
    assert "beta" not in client.get("/v1/fabric/sites").text
    reply = client.post("/v1/completions", json=public)
    assert reply.headers["x-fabric-site"] == "alpha"
    path = f"/v1/fabric/runs/{reply.json()['fabric']['run']}"
    wait_until(lambda: client.get(path).status_code == 200, timeout_s=20)
    assert "beta" not in client.get(path).text
    assert asked(client, public, sites=["beta"]) == (404, "site_not_found")
    assert asked(client, public, data_site="beta") == (404, "site_not_found")


def test_a_batch_of_a_private_model_is_its_subjects_alone(
    hub: RunningHub, client: httpx.Client
) -> None:
    body = COMPLETION | {"model": MODEL}
    hub.grants.close("model", MODEL)
    settle(hub)

    def batch() -> Any:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
        sent = {"files": {"file": ("in.jsonl", json.dumps(line))}, "data": {"purpose": "batch"}}
        file = client.post("/v1/files", **sent).json()["id"]
        new = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        path = f"/v1/batches/{client.post('/v1/batches', json=new).json()['id']}"
        wait_until(
            lambda: client.get(path).json()["status"] in ("completed", "failed"), timeout_s=60
        )
        return client.get(path).json()

    refused = batch()
    assert (refused["status"], refused["errors"]["data"][0]["code"]) == (
        *("failed", "model_not_found"),
    )
    grant(hub, model=MODEL)
    assert batch()["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


def test_a_key_that_another_process_revokes_is_refused(
    hub: RunningHub, client: httpx.Client
) -> None:
    record, key = hub.keys.add_key(PROJECT)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=20) as other:
        assert other.get("/v1/models").status_code == 200
        url = f"sqlite:///{hub.files_dir.parent / 'hub.sqlite'}"
        with Database(url) as elsewhere:
            Keys(elsewhere).revoke(record.id)
        deadline_s = time.monotonic() + 20
        while other.get("/v1/models").status_code != 401:
            assert time.monotonic() < deadline_s


# ---- limits --------------------------------------------------------------------------------------


def test_limits_are_told_as_openais_clients_read_them(
    hub: RunningHub, client: httpx.Client
) -> None:
    assert not any(name.startswith("x-ratelimit") for name in client.get("/v1/models").headers)
    hub.grants.set_limit(f"project:{PROJECT}", requests_per_min=3, tokens_per_min=1000)
    settle(hub)
    public = COMPLETION | {"model": MODEL, "max_tokens": 10}
    first = client.post("/v1/completions", json=public).headers
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-limit-tokens"]) == ("3", "1000")
    assert first["x-ratelimit-remaining-requests"] == "2"
    assert first["x-ratelimit-remaining-tokens"] == "989"
    assert 1 <= int(first["x-ratelimit-reset-requests"].removesuffix("s").split("m")[0]) <= 60
    for _ in range(2):
        assert client.post("/v1/completions", json=public).status_code == 200
    refused = client.post("/v1/completions", json=public)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert client.get("/v1/models").status_code == 200, "what runs nothing is no request"


def test_as_many_run_at_once_as_the_limit_says_and_none_more(hub: RunningHub) -> None:
    hub.keys.add_project("crowd")
    hub.ledger.grant(hub.ledger.open_allocation("crowd", "*"), 10**9)
    keys = [hub.keys.add_key("crowd")[1] for _ in range(4)]
    hub.grants.set_limit("project:crowd", requests_per_min=10)
    settle(hub)
    with httpx.Client(base_url=hub.base_url, timeout=60) as client, ThreadPoolExecutor(40) as pool:

        def ask(number: int) -> int:
            headers = {"authorization": f"Bearer {keys[number % 4]}"}
            body = COMPLETION | {"model": MODEL}
            return client.post("/v1/completions", json=body, headers=headers).status_code

        codes = Counter(pool.map(ask, range(40)))
    assert codes == {200: 10, 429: 30}


def test_a_request_that_never_fits_is_not_worth_another_try(
    hub: RunningHub, client: httpx.Client
) -> None:
    hub.grants.set_limit("key:*", tokens_per_min=50)
    settle(hub)
    reply = client.post("/v1/completions", json=COMPLETION | {"model": MODEL, "max_tokens": 60})
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "request_over_limit")
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers


def test_one_project_at_its_limit_leaves_others_alone(
    hub: RunningHub, client: httpx.Client
) -> None:
    hub.keys.add_project("chemistry")
    hub.ledger.grant(hub.ledger.open_allocation("chemistry", "*"), 10**9)
    _, key = hub.keys.add_key("chemistry")
    hub.grants.set_limit("project:chemistry", requests_per_min=1)
    settle(hub)
    public = COMPLETION | {"model": MODEL}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=20) as other:
        assert [asked(other, public)[0] for _ in range(3)] == [200, 429, 429]
    assert [asked(client, public)[0] for _ in range(3)] == [200] * 3
