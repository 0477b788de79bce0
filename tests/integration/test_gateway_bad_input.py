"""Bad input over HTTP: each a typed error in OpenAI's shape, and a hub that goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import openai
import pytest

from fabric.broker import BrokerSettings
from fabric.gateway import GatewaySettings
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until

LIMIT_BYTES = 8 * 2**20
GOOD = {"model": "fixed", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[httpx.Client]:
    with get_client(hub, hub.api_key) as client:
        yield client
        assert client.post("/v1/completions", json=GOOD).status_code == 200, "the hub is harmed"


def get_client(hub: RunningHub, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    return httpx.Client(base_url=hub.base_url, headers=headers, timeout=20)


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith(("req_", "run_"))
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "detail"}
    assert error["message"].endswith(".")
    assert error["code"].replace("_", "").isalpha()
    return error


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "unheard-of"}, 404, "model_not_found", "model"),
        ({"model": "fixed@9"}, 404, "model_not_found", "model"),
        ({"model": "../etc/passwd;"}, 400, "invalid_parameter", "model"),
        ({"fabric": {"sites": ["gamma"]}}, 404, "site_not_found", "site"),
        ({"fabric": {"data_site": "gamma"}}, 404, "site_not_found", "site"),
        ({"prompt": "word " * 2100}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": [1] * 2100}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 10**30}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": -1}, 400, "invalid_parameter", "max_tokens"),
        ({"n": 0}, 400, "invalid_parameter", "n"),
        ({"n": 10**9}, 400, "invalid_parameter", "n"),
        ({"temperature": 3}, 400, "invalid_parameter", "temperature"),
        ({"colour": "red"}, 400, "unknown_parameter", "colour"),
        ({"best_of": 4}, 400, "unsupported_parameter", "best_of"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(
    client: httpx.Client,
    hub: RunningHub,
    fields: dict[str, object],
    status: int,
    code: str,
    param: str,
) -> None:
    num_charges = len(hub.ledger.statement(PROJECT).lines)
    for stream in (False, True):
        reply = client.post("/v1/completions", json=GOOD | fields | {"stream": stream})
        error = error_of(reply, status)
        assert (error["code"], error["param"]) == (code, param)
        assert error["type"] == "invalid_request_error"
    assert all(line.amount_usu == 0 for line in hub.ledger.statement(PROJECT).lines[num_charges:])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[1, 2]", "list"),
        (b'{"model": "fixed", "prompt": "\xff\xfe"}', "byte 30 is not UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
        (b'{"model": "fixed", "prompt": "\\ud800"}', "hex escape"),
        (b'{"model": "fixed", "prompt": "x", "temperature": NaN}', "finite"),
        (b'{"prompt": ' + b"[" * 100_000, "recursion"),
    ],
)
def test_a_malformed_body_is_refused(client: httpx.Client, data: bytes, said: str) -> None:
    error = error_of(client.post("/v1/completions", content=data), 400)
    assert said in error["message"]


def test_a_50_mb_body_is_413_before_it_is_read(client: httpx.Client, hub: RunningHub) -> None:
    with socket.create_connection(httpx.URL(hub.base_url).netloc.decode().split(":")) as peer:  # type: ignore[arg-type]
        peer.settimeout(5)
        peer.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: hub\r\ncontent-length: 52428800\r\n"
            + f"authorization: Bearer {hub.api_key}\r\n\r\n".encode()
        )
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code": "body_too_large"' in answer


def test_a_body_without_a_length_is_cut_off_at_the_cap(client: httpx.Client) -> None:
    num_sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_sent
        while num_sent < 50 * 2**20:
            num_sent += 2**16
            yield b" " * 2**16

    error = error_of(client.post("/v1/completions", content=endless()), 413)
    assert error["code"] == "body_too_large"
    assert error["detail"] == {"limit_bytes": LIMIT_BYTES}
    assert num_sent < 3 * LIMIT_BYTES


def test_the_openai_client_sees_413_for_a_50_mb_prompt(hub: RunningHub) -> None:
    with (
        openai.OpenAI(base_url=hub.openai_url, api_key=hub.api_key, max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.completions.create(model="fixed", prompt="x" * (50 * 2**20))
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


def test_a_body_just_under_the_cap_is_read(client: httpx.Client) -> None:
    data = json.dumps(GOOD).encode()
    reply = client.post("/v1/completions", content=data + b" " * (LIMIT_BYTES - len(data)))
    assert reply.status_code == 200
    reply = client.post("/v1/completions", content=data + b" " * (LIMIT_BYTES - len(data) + 1))
    assert error_of(reply, 413)["code"] == "body_too_large"


def test_a_large_body_without_a_key_is_401(hub: RunningHub) -> None:
    with get_client(hub, "wrong") as stranger:
        reply = stranger.post("/v1/completions", content=b" " * (LIMIT_BYTES + 1))
    assert error_of(reply, 401)["code"] == "invalid_api_key"


def test_routes_that_are_not_there_answer_in_the_same_shape(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/images/generations"), 404)["code"] == "not_found"
    reply = client.get("/v1/completions")
    assert error_of(reply, 405)["code"] == "not_found"
    assert reply.headers["allow"] == "POST"


def test_another_projects_run_is_not_found(client: httpx.Client, hub: RunningHub) -> None:
    run = client.post("/v1/completions", json=GOOD).json()["fabric"]["run"]
    wait_until(lambda: client.get(f"/v1/fabric/runs/{run}").status_code == 200)
    hub.keys.add_project("chemistry")
    _, key = hub.keys.add_key("chemistry")
    with get_client(hub, key) as other:
        theirs = error_of(other.get(f"/v1/fabric/runs/{run}"), 404)
        nobodys = error_of(other.get("/v1/fabric/runs/run_0"), 404)
        assert theirs["message"].replace(run, "") == nobodys["message"].replace("run_0", "")
        assert other.get("/v1/fabric/runs").json()["data"] == []


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1001", "since=yesterday"])
def test_bad_query_parameters_are_named(client: httpx.Client, query: str) -> None:
    error = error_of(client.get(f"/v1/fabric/usage?{query}"), 400)
    assert error["param"] == query.partition("=")[0]


def test_too_many_requests_is_429_with_a_time_to_retry(hub: RunningHub) -> None:
    record, key = hub.keys.add_key(PROJECT, max_concurrent=1)
    slow = GOOD | {"max_tokens": 1000, "stream": True}
    for site in hub.sites.values():
        site.engine.token_s = 0.02
    try:
        with get_client(hub, key) as client:
            with client.stream("POST", "/v1/completions", json=slow) as first:
                assert first.status_code == 200
                reply = client.post("/v1/completions", json=GOOD)
                error = error_of(reply, 429)
            assert (error["code"], error["type"]) == ("too_many_requests", "rate_limit_error")
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.headers["x-should-retry"] == "true"
            wait_until(lambda: client.post("/v1/completions", json=GOOD).status_code == 200)
    finally:
        for site in hub.sites.values():
            site.engine.token_s = 0.0
        hub.keys.revoke(record.id)


def test_no_balance_is_402(hub: RunningHub) -> None:
    hub.keys.add_project("poor")
    hub.ledger.grant(hub.ledger.open_allocation("poor", "*"), 10)
    _, key = hub.keys.add_key("poor")
    with get_client(hub, key) as client:
        error = error_of(client.post("/v1/completions", json=GOOD | {"max_tokens": 100}), 402)
        assert (error["code"], error["type"]) == ("insufficient_balance", "insufficient_quota")
        assert error["detail"]["available_usu"] == 10
        assert client.post("/v1/completions", json=GOOD | {"max_tokens": 4}).status_code == 200


def test_no_replica_is_503_with_a_time_to_retry(tmp_path: Path) -> None:
    broker = BrokerSettings(patience_s=0.2)
    with running_hub(tmp_path, sites=["alpha"], broker=broker) as hub:
        hub.kill_site("alpha")
        with get_client(hub, hub.api_key) as client:
            wait_until(lambda: client.get("/healthz").json()["replicas"] == 0)
            reply = client.post("/v1/completions", json=GOOD)
    error = error_of(reply, 503)
    assert (error["code"], error["type"]) == ("no_replica", "server_error")
    assert int(reply.headers["retry-after"]) >= 1


def test_a_deadline_that_passes_is_504(tmp_path: Path) -> None:
    def stuck() -> FixedDelayEngine:
        return FixedDelayEngine(first_token_s=60)

    with running_hub(tmp_path, engine=stuck) as hub, get_client(hub, hub.api_key) as client:
        reply = client.post("/v1/completions", json=GOOD | {"fabric": {"deadline_s": 0.3}})
    assert error_of(reply, 504)["code"] == "deadline_exceeded"


def test_a_defect_is_500_with_an_id_and_no_insides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down() -> NoReturn:
        raise RuntimeError("the insides")

    with running_hub(tmp_path, sites=[]) as hub, get_client(hub, hub.api_key) as client:
        hub.catalog.models = break_down  # type: ignore[method-assign]
        reply = client.get("/v1/models")
    error = error_of(reply, 500)
    assert reply.headers["x-request-id"] in error["message"]
    assert "the insides" not in reply.text
    assert "the insides" in caplog.text


def test_the_cap_on_bodies_is_a_setting(tmp_path: Path) -> None:
    gateway = GatewaySettings(body_limit_bytes=1024)
    with (
        running_hub(tmp_path, sites=[], gateway=gateway) as hub,
        get_client(hub, hub.api_key) as client,
    ):
        reply = client.post("/v1/completions", json=GOOD | {"prompt": "x" * 1024})
    assert error_of(reply, 413)["detail"] == {"limit_bytes": 1024}
