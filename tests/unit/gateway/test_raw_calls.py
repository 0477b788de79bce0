"""Tickets over HTTP, and what an instance is paid for them: spoken to frame by frame."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from fabric.broker import BrokerSettings
from fabric.catalog import RunRecord
from fabric.messages import (
    EMBED_SAMPLING,
    Hello,
    Limits,
    Metered,
    ProgramInput,
    Redeem,
    Redeemed,
    Request,
    RunState,
    Sampling,
    Settled,
    TextInput,
    Usage,
    parse_from_hub,
)
from fabric.testing.fixed_programs import get_manifest
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

DIGEST = "sha256:" + "0" * 64
LIMITS = Limits(context_tokens=2048, max_rows=4, cache_tokens=8192, modes=("query", "program"))
GRANT_USU = 10_000
MAX_CHARGE_USU = 6 + 2 * 10
"""Of ``request()``: five bytes and one token more, and ten tokens of output."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    settings = BrokerSettings(lease_s=4.0, sweep_s=0.1)
    with running_hub(tmp_path, sites=(), grant_usu=GRANT_USU, broker=settings) as hub:
        hub.catalog.add_site("alpha")
        hub.catalog.add_site("beta")
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {hub.api_key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=10) as client:
        yield client


class Instance:
    """An instance that says exactly what it is told."""

    def __init__(self, socket: ClientConnection, http: httpx.Client) -> None:
        self.socket = socket
        self.http = http

    def redeem(self, ticket: str, asked: Request, **changes: object) -> str | None:
        """Return the code a ticket is refused with."""
        frame = Redeem(task_id=asked.id, attempt=1, ticket=ticket, request=asked)
        self.socket.send(frame.model_copy(update=changes).model_dump_json())
        answer = self._answer()
        assert isinstance(answer, Redeemed)
        return answer.failure.code if answer.failure else None

    def report(self, run: str, failure_code: str | None = None, **usage: int) -> None:
        """Say what a run consumed, and wait until that is settled."""
        frame = Metered(
            task_id=run, attempt=1, usage=Usage(**usage), failure_code=failure_code, total_s=1.5
        )
        self.socket.send(frame.model_dump_json())
        assert self._answer() == Settled(task_id=run, attempt=1)

    def _answer(self) -> object:
        return parse_from_hub(str(self.socket.recv(timeout=10)))


@pytest.fixture
def launch(hub: RunningHub) -> Callable[..., Callable[[], Iterator[Instance]]]:
    def at(site: str = "alpha") -> Callable[[], Iterator[Instance]]:
        record, token = hub.catalog.add_launch(site, MODEL)
        hello = Hello(
            instance=record.instance,
            site=site,
            model=record.model,
            digest=DIGEST,
            limits=LIMITS,
            dtype="float32",
            engine="test",
            points=get_manifest(MODEL, DIGEST, LIMITS.context_tokens),
        )

        @contextmanager
        def dialled() -> Iterator[Instance]:
            headers = {"Authorization": f"Bearer {token}"}
            with (
                connect(hub.session_url, additional_headers=headers) as socket,
                httpx.Client(base_url=hub.base_url, headers=headers) as http,
            ):
                socket.send(hello.model_dump_json())
                assert '"welcome"' in str(socket.recv(timeout=10))
                yield Instance(socket, http)

        return dialled

    return at


def issue(client: httpx.Client, site: str = "alpha", **body: object) -> str:
    reply = client.post("/v1/fabric/tickets", json={"site": site, **body})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["ticket"])


def request(**changes: object) -> Request:
    asked = Request(
        model=MODEL,
        input=TextInput(text="hello"),
        sampling=Sampling(max_tokens=10),
        deadline_s=60.0,
    )
    return asked.model_copy(update=changes)


def balance(hub: RunningHub) -> tuple[int, int]:
    """Return what is available and what is held."""
    (one,) = hub.ledger.allocations(PROJECT)
    hub.ledger.verify()
    return one.available_usu, one.held_usu


def record_of(hub: RunningHub, run: str) -> RunRecord:
    return hub.catalog.run(run, project=PROJECT)


# ---- tickets ------------------------------------------------------------------------------------


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


# ---- calls --------------------------------------------------------------------------------------


def test_a_call_is_held_charged_by_its_usage_and_recorded(hub, client, launch) -> None:
    asked = request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        assert balance(hub) == (GRANT_USU - MAX_CHARGE_USU, MAX_CHARGE_USU)
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert balance(hub) == (GRANT_USU - 11, 0)
    run = record_of(hub, asked.id)
    assert (run.state, run.site, run.charge_usu) == (RunState.COMPLETED, "alpha", 11)
    assert (run.usage.output_tokens, run.total_s) == (4, 1.5)
    assert "raw call" in run.placement.reason
    (line,) = client.get("/v1/fabric/usage").json()["lines"][-1:]
    assert (line["kind"], line["run"], line["site"]) == ("charge", asked.id, "alpha")


def test_the_rate_is_that_of_the_site_when_the_call_came(hub, client, launch) -> None:
    hub.ledger.set_rate(MODEL, "alpha", prompt_usu=100, cached_prompt_usu=100, output_usu=200)
    asked = request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        hub.ledger.set_rate(MODEL, "alpha", prompt_usu=1, cached_prompt_usu=1, output_usu=1)
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert record_of(hub, asked.id).charge_usu == 1100


def test_the_same_usage_twice_is_charged_once(hub, client, launch) -> None:
    asked = request()
    with launch()() as instance:
        ticket = issue(client)
        assert instance.redeem(ticket, asked) is None
        for output_tokens in (4, 4, 9):
            instance.report(asked.id, prompt_tokens=3, output_tokens=output_tokens)
        assert instance.redeem(ticket, asked) == "already_exists"
    assert balance(hub) == (GRANT_USU - 11, 0)
    assert record_of(hub, asked.id).usage.output_tokens == 4


def test_an_instance_cannot_charge_more_than_was_held(hub, client, launch) -> None:
    asked = request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        instance.report(asked.id, prompt_tokens=10**9, cached_prompt_tokens=5, output_tokens=10**9)
    assert balance(hub) == (GRANT_USU - MAX_CHARGE_USU, 0)
    assert record_of(hub, asked.id).usage.output_tokens == 10


def test_usage_without_a_ticket_of_this_instance_costs_nothing(
    hub, client, launch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = request()
    with launch()() as instance, launch()() as other:
        assert instance.redeem(issue(client), asked) is None
        other.report(asked.id, prompt_tokens=3, output_tokens=4)
        other.report("run_unheard_of", prompt_tokens=3, output_tokens=4)
        assert balance(hub) == (GRANT_USU - MAX_CHARGE_USU, MAX_CHARGE_USU)
        instance.report(asked.id, "request_cancelled", prompt_tokens=3, output_tokens=1)
    assert "without a ticket" in caplog.text
    assert balance(hub) == (GRANT_USU - 5, 0)
    assert record_of(hub, asked.id).state is RunState.CANCELLED


def test_a_call_that_computed_nothing_costs_nothing(hub, client, launch) -> None:
    asked = request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        instance.report(asked.id, "context_length_exceeded")
    assert balance(hub) == (GRANT_USU, 0)
    run = record_of(hub, asked.id)
    assert (run.state, run.error_code) == (RunState.FAILED, "context_length_exceeded")


def test_a_ticket_pays_up_to_its_cap(hub, client, launch) -> None:
    ticket = issue(client, max_usu=MAX_CHARGE_USU + 11)
    first, second, third = request(), request(), request()
    with launch()() as instance:
        assert instance.redeem(ticket, first) is None
        assert instance.redeem(ticket, second) == "spent_ticket"
        instance.report(first.id, prompt_tokens=3, output_tokens=4)
        assert instance.redeem(ticket, third) is None
        instance.report(third.id, prompt_tokens=3, output_tokens=4)
        assert instance.redeem(ticket, request()) == "spent_ticket"
    assert balance(hub) == (GRANT_USU - 22, 0)


@pytest.mark.parametrize(
    ("why", "code"),
    [
        ("key", "invalid_ticket"),
        ("revoked", "invalid_ticket"),
        ("empty", "missing_ticket"),
        ("another site", "foreign_ticket"),
        ("another model", "no_replica"),
        ("unknown model", "model_not_found"),
        ("only elsewhere", "no_replica"),
        ("local data elsewhere", "no_replica"),
        ("too dear", "insufficient_balance"),
        ("no id", "invalid_parameter"),
        ("another's request", "protocol_violation"),
    ],
)
def test_what_may_not_run_is_refused_and_nothing_held(hub, client, launch, why, code) -> None:
    hub.catalog.add_model("other", "1", context_tokens=64, source="x:", digest="sha256:" + "1" * 64)
    ticket, asked, changes = issue(client), request(), {}
    match why:
        case "key":
            ticket = hub.api_key
        case "revoked":
            client.delete(f"/v1/fabric/tickets/{ticket[5:17]}")
        case "empty":
            ticket = ""
        case "another site":
            ticket = issue(client, "beta")
        case "another model":
            asked = request(model="other")
        case "unknown model":
            asked = request(model="unheard-of")
        case "only elsewhere":
            asked = request(sites=("beta",))
        case "local data elsewhere":
            asked = request(policy="local-only", data_site="beta")
        case "too dear":
            asked = request(input=TextInput(text="x" * 2 * GRANT_USU), sampling=Sampling(n=16))
        case "no id":
            asked = request(id="../" + "x" * 100)
        case "another's request":
            changes = {"task_id": "run_x"}
    with launch()() as instance:
        assert instance.redeem(ticket, asked, **changes) == code
        assert instance.redeem(issue(client), request()) is None
    assert balance(hub)[1] == MAX_CHARGE_USU


def test_calls_count_for_the_keys_limit(hub, client, launch) -> None:
    _, key = hub.keys.add_key(PROJECT, max_concurrent=1)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers) as single, launch()() as instance:
        first, second = request(), request()
        assert instance.redeem(issue(single), first) is None
        assert instance.redeem(issue(single), second) == "too_many_requests"
        instance.report(first.id, prompt_tokens=3, output_tokens=4)
        assert instance.redeem(issue(single), second) is None


def test_a_ticket_opens_nothing_that_its_project_was_not_granted(hub, client, launch) -> None:
    ticket, dialled = issue(client), launch()
    hub.grants.close("model", MODEL)
    with dialled() as instance:
        wait_until(lambda: instance.redeem(ticket, request()) == "model_not_found", timeout_s=20)
        hub.grants.add(f"project:{PROJECT}", model=MODEL, site="beta")
        wait_until(lambda: instance.redeem(ticket, request()) == "not_granted", timeout_s=20)


def test_raw_calls_count_for_the_minute(hub, client, launch) -> None:
    hub.grants.set_limit(f"project:{PROJECT}", requests_per_min=2, tokens_per_min=100)
    ticket = issue(client)
    wait_until(lambda: "x-ratelimit-limit-tokens" in client.get("/v1/models").headers, timeout_s=20)
    with launch()() as instance:
        first = request()
        assert instance.redeem(ticket, first) is None
        instance.report(first.id, prompt_tokens=3, output_tokens=4)
        headers = client.get("/v1/models").headers
        assert headers["x-ratelimit-remaining-tokens"] == "93"
        assert instance.redeem(ticket, request()) is None
        assert instance.redeem(ticket, request()) == "rate_limit_exceeded"


def test_a_hold_lives_as_long_as_its_instances_session(hub, client, launch) -> None:
    asked, dialled = request(), launch()
    with dialled() as instance:
        assert instance.redeem(issue(client), asked) is None
        now = hub.ledger.hold(
            asked.id, allocation=f"allocation:{PROJECT}:*", amount_usu=26, lease_s=1
        )
        wait_until(lambda: _lease(hub, asked.id) > now.lease_expires_at, timeout_s=40)
    wait_until(lambda: balance(hub) == (GRANT_USU, 0), timeout_s=40)
    run = record_of(hub, asked.id)
    assert (run.state, run.error_code, run.charge_usu) == (RunState.FAILED, "session_lost", 0)
    with dialled() as instance:
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert balance(hub) == (GRANT_USU, 0)


def _lease(hub: RunningHub, run: str) -> object:
    amount_usu = MAX_CHARGE_USU
    allocation = f"allocation:{PROJECT}:*"
    hold = hub.ledger.hold(run, allocation=allocation, amount_usu=amount_usu, lease_s=1)
    return hold.lease_expires_at


def test_an_instance_that_comes_back_is_paid(hub, client, launch) -> None:
    asked, dialled = request(), launch()
    with dialled() as instance:
        assert instance.redeem(issue(client), asked) is None
    with dialled() as instance:
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert record_of(hub, asked.id).charge_usu == 11


def test_tickets_are_not_logged(hub, client, launch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fabric")
    ticket = issue(client)
    with launch()() as instance:
        assert instance.redeem(ticket, request()) is None
        assert instance.redeem(ticket[:-1] + "!", request()) == "invalid_ticket"
    records = [json.dumps(one.__dict__, default=repr) for one in caplog.records]
    assert any("raw call refused" in one for one in records)
    assert not any(ticket[18:30] in one for one in records)


# ---- programs ------------------------------------------------------------------------------------

READ, SAVE = {"op": "read", "at": "layers.1.out"}, {"op": "save", "name": "h", "x": 0}
WRITE = {"op": "write", "at": "layers.1.out", "mode": "scale", "alpha": 0.0}


def program(*nodes: object, **fields: object) -> Request:
    runs = [{"id": "a", "text": "hello", "nodes": nodes or (READ, SAVE), "gen": {"max_tokens": 2}}]
    return Request(
        mode="program",
        model=MODEL,
        input=ProgramInput.model_validate({"program": {"runs": runs}}),
        sampling=EMBED_SAMPLING,
        deadline_s=60.0,
        **fields,
    )


@pytest.fixture
def priced(hub: RunningHub) -> RunningHub:
    hub.ledger.set_rate(
        MODEL, "*", prompt_usu=1, cached_prompt_usu=1, output_usu=2, hook_out_usu=1, device_usu=100
    )
    return hub


@contextmanager
def key_of(hub: RunningHub, *scopes: str) -> Iterator[httpx.Client]:
    _, key = hub.keys.add_key(PROJECT, scopes=("query", *scopes))
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers) as client:
        yield client


def test_a_raw_program_is_held_metered_and_never_charged_for_more(priced, launch) -> None:
    asked = program()
    with key_of(priced, "program:read") as client, launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        held = balance(priced)[1]
        # Six prompt tokens, two of output, a second of computing, and what it saves.
        assert held > 6 + 4 + 100
        instance.report(
            asked.id, prompt_tokens=3, output_tokens=2, hook_bytes_out=200, hook_bytes_in=10**9
        )
    assert balance(priced) == (GRANT_USU - (3 + 4 + 200), 0)
    run = record_of(priced, asked.id)
    assert run.program is not None
    assert (run.usage.hook_bytes_in, run.usage.hook_bytes_out) == (0, 200)


def test_an_instance_cannot_charge_a_program_more_than_was_held(priced, launch) -> None:
    asked = program()
    with key_of(priced, "program:read") as client, launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        held = balance(priced)[1]
        much = dict.fromkeys(("prompt_tokens", "output_tokens", "hook_bytes_out"), 10**9)
        instance.report(asked.id, **much, device_s=10**6)
    available_usu, still_held_usu = balance(priced)
    assert still_held_usu == 0
    assert GRANT_USU - held <= available_usu < GRANT_USU


def test_a_ticket_permits_what_its_key_does(priced, launch) -> None:
    with launch()() as instance:
        with key_of(priced) as client:
            assert instance.redeem(issue(client), program()) == "permission_denied"
        with key_of(priced, "program:read") as client:
            assert instance.redeem(issue(client), program(WRITE)) == "permission_denied"
        with key_of(priced, "program:read", "program:write") as client:
            assert instance.redeem(issue(client), program(WRITE)) is None


@pytest.mark.parametrize(
    ("nodes", "code"),
    [
        (({**READ, "at": "layers.9.out"}, SAVE), "point_unknown"),
        (({"op": "zeros", "shape": [2**30]}, SAVE), "program_too_large"),
        (
            ({"op": "artifact", "id": "art_" + "0" * 32, "run": "a", "save": "h"}, SAVE),
            "program_invalid",
        ),
    ],
)
def test_a_raw_program_that_cannot_run_is_refused_before_its_hold(
    priced, launch, nodes, code
) -> None:
    with key_of(priced, "program:read") as client, launch()() as instance:
        assert instance.redeem(issue(client), program(*nodes)) == code
    assert balance(priced) == (GRANT_USU, 0)


def test_an_instance_leaves_results_of_the_calls_it_has(priced, launch, client) -> None:
    asked, name = program(), "art_" + "7" * 32
    with key_of(priced, "program:read") as user, launch()() as instance, launch()() as other:
        assert instance.redeem(issue(user), asked) is None
        where = {"artifact": name, "run": asked.id, "part": "a"}
        path = "/v1/fabric/instance/artifacts"
        assert other.http.put(path, params=where, content=b"x").status_code == 404
        assert instance.http.put(path, params=where, content=b"x" * 10**5).status_code == 413
        assert instance.http.put(path, params=where, content=b"saved").status_code == 200
        assert user.get(f"/v1/fabric/artifacts/{name}").content == b"saved"
        instance.report(asked.id, prompt_tokens=3)
