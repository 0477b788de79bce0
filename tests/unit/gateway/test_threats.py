"""Threats to callers and to the hub that no other page of tests has: each tried over HTTP."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from fabric.cli.main import fabric_admin
from fabric.messages import Limits
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

CANARY = "canary-5be0c1"
COMPLETION = {"model": MODEL, "prompt": "x", "max_tokens": 1}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_prompt_is_in_no_log_no_database_and_no_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn.error", "websockets"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    # As a hub that is asked to log all it can.
    CliRunner().invoke(fabric_admin, ["site", "list-shipped", "-vv"])
    with (
        running_hub(tmp_path) as hub,
        httpx.Client(base_url=hub.base_url, headers=bearer(hub.api_key), timeout=20) as client,
    ):
        asked = COMPLETION | {"prompt": f"say {CANARY}", "stop": [CANARY + "stop"], "user": CANARY}
        for body in (asked, asked | {"stream": True}, asked | {"sites": CANARY}):
            client.post("/v1/completions", json=body)
        chat = {"model": MODEL, "messages": [{"role": "user", "content": CANARY}]}
        client.post("/v1/chat/completions", json=chat | {"max_tokens": 1})
        client.post("/v1/embeddings", json={"model": MODEL, "input": CANARY})
        client.post("/v1/completions", json=asked | {"prompt": f"{CANARY} " * 3000})
        runs = client.get("/v1/fabric/runs").json()["data"]
        assert len(runs) >= 4
        metrics = httpx.get(f"{hub.base_url}/metrics").text
    told = {one.name for one in caplog.records if CANARY in f"{one.getMessage()} {vars(one)}"}
    assert told == set()
    assert CANARY not in metrics
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


def test_fifty_at_once_on_a_balance_for_one_run_once(tmp_path: Path) -> None:
    # A prompt token costs 1, an answer's 2: a request holds at most 2 + 8.
    with running_hub(tmp_path, sites=["alpha"], grant_usu=12) as hub:
        body = COMPLETION | {"max_tokens": 4}
        with (
            httpx.Client(base_url=hub.base_url, headers=bearer(hub.api_key), timeout=60) as client,
            ThreadPoolExecutor(50) as pool,
        ):
            replies = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(50)))
        assert sorted({reply.status_code for reply in replies}) == [200, 402]
        # One is charged 9 micro-SU, and the 3 that are left hold no other.
        assert sum(reply.status_code == 200 for reply in replies) == 1
        hub.ledger.verify()
        left = hub.ledger.allocation(f"allocation:{PROJECT}:*")
        assert (left.available_usu, left.held_usu) == (3, 0)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[RunningHub]:
    """A hub whose one instance computes four rows at once, each for seconds."""
    limits = Limits(context_tokens=2048, max_rows=4, cache_tokens=8192)

    def engine() -> FixedDelayEngine:
        return FixedDelayEngine(limits=limits, token_s=0.02)

    with running_hub(tmp_path, sites=["alpha"], engine=engine) as hub:
        yield hub


def test_one_that_takes_all_it_can_leaves_room_for_another(slow: RunningHub) -> None:
    slow.keys.add_project("abuser")
    slow.ledger.grant(slow.ledger.open_allocation("abuser", "*"), 10**9)
    slow.grants.set_limit("project:abuser", max_concurrent=3)
    keys = [slow.keys.add_key("abuser")[1] for _ in range(4)]
    refused, took_s = [], []

    def abuse(client: httpx.Client, number: int) -> None:
        began_s = time.monotonic()
        reply = client.post(
            "/v1/completions",
            json=COMPLETION | {"max_tokens": 400},
            headers=bearer(keys[number % 4]),
        )
        if reply.status_code == 429:
            refused.append(reply.json()["error"]["code"])
        else:
            took_s.append(time.monotonic() - began_s)

    with (
        httpx.Client(base_url=slow.base_url, timeout=120) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        flood = [pool.submit(abuse, client, number) for number in range(16)]
        wait_until(lambda: len(refused) >= 8, timeout_s=60)
        victim_s = []
        for _ in range(5):
            began_s = time.monotonic()
            reply = client.post("/v1/completions", json=COMPLETION, headers=bearer(slow.api_key))
            assert reply.status_code == 200
            victim_s.append(time.monotonic() - began_s)
        for one in flood:
            one.result()
    assert set(refused) == {"too_many_requests"}
    assert statistics.median(victim_s) < min(took_s) / 2


def test_what_waits_for_a_private_model_is_told_to_nobody_else(slow: RunningHub) -> None:
    slow.keys.add_project("stranger")
    stranger = bearer(slow.keys.add_key("stranger")[1])
    slow.grants.add(f"project:{PROJECT}", model=MODEL)
    queue = f"{slow.base_url}/v1/fabric/queue"

    mine = bearer(slow.api_key)

    def ask(client: httpx.Client) -> int:
        body = COMPLETION | {"max_tokens": 80}
        url = f"{slow.base_url}/v1/completions"
        return client.post(url, json=body, headers=mine).status_code

    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(16) as pool:
        wait_until(
            lambda: MODEL not in client.get(f"{slow.base_url}/v1/models", headers=stranger).text,
            timeout_s=20,
        )
        flood = [pool.submit(ask, client) for _ in range(16)]
        wait_until(lambda: bool(client.get(queue, headers=mine).json()["data"]), timeout_s=60)
        assert client.get(queue, headers=stranger).json()["data"] == []
        assert {one.result() for one in flood} == {200}


@pytest.mark.parametrize("host", ["healthz", "127.0.0.1/healthz?", "x/openapi.json#", "a b", ""])
def test_the_host_header_opens_no_route(hub: RunningHub, host: str) -> None:
    address, port = hub.base_url.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), timeout=20) as raw:
        raw.sendall(
            f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        status = raw.makefile("rb").readline().split()[1]
    assert status in (b"401", b"400")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/..%2f..%2f..%2fetc%2fpasswd/content",
        "/v1/files/%2e%2e%2fhub.sqlite/content",
        "/v1/fabric/artifacts/..%2f..%2fhub.sqlite",
        "/v1/fabric/adapters/..%2fhub.sqlite",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/files/%00/content",
        "/../../etc/passwd",
        "//healthz/../v1/models",
    ],
)
def test_no_path_of_a_file_is_served(hub: RunningHub, path: str) -> None:
    _, key = hub.keys.add_key(PROJECT, scopes=["query", "program:read"])
    reply = httpx.get(f"{hub.base_url}{path}", headers=bearer(key), timeout=20)
    assert reply.status_code == 404, reply.text
    assert b"root:" not in reply.content
    assert b"SQLite" not in reply.content


@pytest.mark.parametrize(
    "sent",
    [
        {"cookies": {"authorization": "KEY", "api_key": "KEY", "session": "KEY"}},
        {"params": {"api_key": "KEY", "key": "KEY", "authorization": "Bearer KEY"}},
        {"headers": {"x-api-key": "KEY"}},
        {"headers": {"authorization": "Basic KEY"}},
        {"headers": {"authorization": "KEY"}},
    ],
    ids=["cookie", "query", "other header", "other scheme", "no scheme"],
)
def test_a_key_counts_nowhere_but_where_no_browser_puts_it(
    hub: RunningHub, sent: dict[str, dict[str, str]]
) -> None:
    filled = {
        part: {name: value.replace("KEY", hub.api_key) for name, value in values.items()}
        for part, values in sent.items()
    }
    with httpx.Client(base_url=hub.base_url, cookies=filled.pop("cookies", None)) as client:
        reply = client.get("/v1/models", **filled)
    assert reply.status_code == 401
    assert hub.api_key not in reply.text


def test_no_other_pages_script_may_read_what_the_hub_answers(
    hub: RunningHub, client: httpx.Client
) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for reply in (
        client.get("/v1/models", headers=origin),
        client.options("/v1/completions", headers=origin),
        client.get("/healthz", headers=origin),
    ):
        assert not any(name.startswith("access-control") for name in reply.headers)
        assert "set-cookie" not in reply.headers


def test_a_key_is_compared_whole(hub: RunningHub) -> None:
    head, tail = hub.api_key[:17], hub.api_key[17:]
    for wrong in (
        head + tail[::-1],
        head + tail[:-1],
        hub.api_key + "a",
        hub.api_key.upper(),
        f" {hub.api_key}x",
        head,
    ):
        reply = httpx.get(f"{hub.base_url}/v1/models", headers=bearer(wrong))
        assert reply.status_code == 401, wrong
