"""Our client against a service that answers what the test tells it to."""

import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID, uuid4

import pytest
from globus_compute_sdk.errors import DeserializationError
from globus_compute_sdk.serialize import ComputeSerializer

from fabric.compute import ComputePool, ComputeTarget, RequestBudget, ServiceLimits
from fabric.compute.client import get_client, get_pinned_runtime, service_errors
from fabric.errors import (
    CredentialsRefused,
    PayloadTooLarge,
    ServiceBusy,
    ServiceRefused,
    ServiceUnreachable,
)

ENDPOINT = UUID("11111111-2222-4333-8444-555555555555")
ONLINE = (200, {"status": "online", "details": {"managers": 1}})
TOKEN = {
    "expires_in": 172_800,
    "scope": "https://auth.globus.org/scopes/facd7ccc-c5f4-42aa-916b-a0e270e2c2a9/all",
    "resource_server": "funcx_service",
    "token_type": "Bearer",
    "other_tokens": [],
}


class ScriptedService(ThreadingHTTPServer):
    """Answers requests for tokens by itself, and all others from ``script``, the last for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.script: list[tuple] = [ONLINE]
        self.auth_script: list[tuple] = []
        self.tokens = 0
        self.seen: list[tuple[str, str]] = []
        self.seen_at: list[float] = []


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedService

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if "/oauth2/token" not in self.path:
            return self.do_GET()
        if self.server.auth_script:
            return self.answer(*self.server.auth_script.pop(0))
        self.server.tokens += 1
        return self.answer(200, {**TOKEN, "access_token": f"token-{self.server.tokens}"})

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Authorization"]))
        self.server.seen_at.append(time.monotonic())
        script = self.server.script
        self.answer(*(script.pop(0) if len(script) > 1 else script[0]))

    def answer(self, status: int, body: dict, headers: dict | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedService]:
    with ScriptedService() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("GLOBUS_SDK_ENVIRONMENT", "local")
        monkeypatch.setenv("GLOBUS_SDK_SERVICE_URL_AUTH", f"{server.url}/")
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.shutdown()


@pytest.fixture
def budget() -> RequestBudget:
    return RequestBudget(ServiceLimits())


def refusal(status: int, code: str, reason: str) -> tuple:
    return status, {"status": "Failed", "code": code, "reason": reason, "http_status_code": status}


def wait_until(condition: Callable[[], object], *, timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def ask(budget: RequestBudget) -> dict:
    with service_errors():
        return get_client(budget, client_id="id", client_secret="secret").get_endpoint_status(
            ENDPOINT
        )


def test_expired_token_is_refreshed_once(service, budget) -> None:
    service.script = [refusal(401, "UNAUTHORIZED", "expired"), ONLINE]
    assert ask(budget)["status"] == "online"
    assert [header for _, header in service.seen] == ["Bearer token-1", "Bearer token-2"]


def test_token_refused_after_its_refresh_is_a_typed_error(service, budget) -> None:
    service.script = [refusal(401, "UNAUTHORIZED", "told so")]
    with pytest.raises(CredentialsRefused, match="told so"):
        ask(budget)
    assert len(service.seen) == 2
    assert service.tokens == 2


def test_wrong_secret_is_a_typed_error(service, budget) -> None:
    service.auth_script = [(401, {"error": "invalid_client"})]
    with pytest.raises(CredentialsRefused, match="401"):
        ask(budget)
    assert service.seen == []


def test_every_request_is_counted_the_sdks_own_retries_too(service, budget) -> None:
    service.script = [refusal(503, "DOWN", "for a moment"), ONLINE]
    ask(budget)
    assert budget.num_requests == len(service.seen) == 2


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (refusal(404, "ENDPOINT_NOT_FOUND", "no such one"), ServiceRefused, "404 .*: no such one"),
        (refusal(403, "FUNCTION_NOT_PERMITTED", "not you"), ServiceRefused, "NOT_PERMITTED"),
        (refusal(500, "INTERNAL", "broken"), ServiceUnreachable, "500 broken"),
        ((429, {}, {"Retry-After": "7"}), ServiceBusy, "in 7 s"),
        ((429, {}, {"Retry-After": "tomorrow"}), ServiceBusy, "in 10 s"),
    ],
)
def test_refusals_are_typed_and_say_why(service, budget, answer, error, says) -> None:
    service.script = [answer]
    with pytest.raises(error, match=says):
        ask(budget)


def test_429_is_not_repeated_by_the_sdk(service, budget) -> None:
    service.script = [(429, {}, {"Retry-After": "1"}), ONLINE]
    with pytest.raises(ServiceBusy):
        ask(budget)
    assert len(service.seen) == 1


def test_service_that_does_not_listen_is_unreachable(service, budget, free_port, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")
    with pytest.raises(ServiceUnreachable):
        ask(budget)


def test_pickles_are_never_read(service, budget) -> None:
    client = get_client(budget, client_id="id", client_secret="secret")
    pickled = ComputeSerializer().serialize({"a": 1})
    with pytest.raises(DeserializationError, match="disabled"):
        client.fx_serializer.deserialize(pickled)
    written = client.fx_serializer.serialize({"a": [1, "é"]})
    assert json.loads(written.split("\n", 1)[1]) == {"a": [1, "é"]}


def test_runtime_is_the_same_on_every_machine(service, budget, monkeypatch) -> None:
    client = get_client(budget, client_id="id", client_secret="secret")
    here = client.create_batch().user_runtime
    monkeypatch.setattr(platform, "node", lambda: "another-host")
    monkeypatch.setattr(platform, "python_version", lambda: "3.12.9")
    assert client.create_batch().user_runtime == here == get_pinned_runtime()


# ---- the pool, as far as nothing needs to run ------------------------------------------------


@pytest.fixture
def pool(service) -> Iterator[ComputePool]:
    with ComputePool(
        client_factory=lambda budget: get_client(budget, client_id="id", client_secret="secret")
    ) as pool:
        yield pool


TARGET = ComputeTarget(endpoint_id=ENDPOINT)


def test_status_is_asked_once_while_it_is_fresh(service, pool) -> None:
    answers = [pool.status(ENDPOINT) for _ in range(5)]
    assert all(answer.online and answer.detail == {"managers": 1} for answer in answers)
    assert len(service.seen) == 1


def test_too_large_arguments_are_refused_before_anything_is_sent(service, pool) -> None:
    with pytest.raises(PayloadTooLarge) as caught:
        pool.submit(TARGET, uuid4(), ("x" * 10_000_001,))
    assert caught.value.detail["cap_bytes"] == 10_000_000
    assert caught.value.detail["size_bytes"] > 10_000_000
    assert service.seen == []


def test_submit_that_is_refused_fails_its_task(service, pool) -> None:
    service.script = [refusal(404, "FUNCTION_NOT_FOUND", "no such function")]
    with pytest.raises(ServiceRefused, match="no such function"):
        pool.submit(TARGET, uuid4()).result(30)


def test_refused_credentials_fail_every_task(service, pool) -> None:
    service.script = [refusal(401, "UNAUTHORIZED", "told so")]
    for future in [pool.submit(TARGET, uuid4()) for _ in range(3)]:
        with pytest.raises(CredentialsRefused):
            future.result(30)


def test_429_silences_the_whole_identity(service, pool) -> None:
    service.script = [(429, {}, {"Retry-After": "2"}), refusal(404, "GONE", "gone")]
    with pytest.raises(ServiceBusy):
        pool.status(ENDPOINT)
    with pytest.raises(ServiceRefused):
        pool.submit(TARGET, uuid4()).result(30)
    assert service.seen_at[1] - service.seen_at[0] >= 2.0


def test_task_is_cancelled_until_it_is_on_its_way(service, pool) -> None:
    service.script = [(429, {}, {"Retry-After": "600"})]
    on_its_way = pool.submit(TARGET, uuid4())
    wait_until(lambda: service.seen)
    waiting = pool.submit(TARGET, uuid4())
    assert waiting.cancel()
    assert not on_its_way.cancel()


def test_task_that_was_never_sent_times_out_and_says_so(service, pool) -> None:
    service.script = [(429, {}, {"Retry-After": "600"})]
    error = pool.submit(TARGET, uuid4(), timeout_s=0.5).exception(30)
    assert error.code == "task_timed_out"
    assert error.detail["sent"] is False


def test_close_fails_what_is_open_and_refuses_more(service, pool) -> None:
    service.script = [(429, {}, {"Retry-After": "600"})]
    future = pool.submit(TARGET, uuid4())
    pool.close()
    assert future.exception(0).code == "task_lost"
    with pytest.raises(ServiceUnreachable, match="not running"):
        pool.submit(TARGET, uuid4())
    with pytest.raises(ServiceUnreachable, match="not running"):
        pool.status(ENDPOINT)
    pool.close()


def test_pool_that_was_not_started_says_so() -> None:
    with pytest.raises(ServiceUnreachable, match="not running"):
        ComputePool().submit(TARGET, uuid4())
