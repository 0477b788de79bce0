"""Every route, for every kind of caller, generated from the app's own route table.

A route without an entry in ``MATRIX`` fails here, whoever adds it. What belongs to the owner's
project, or was granted to it, is for a stranger as if it had never been.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from fabric.auth import SCOPES
from fabric.gateway import access
from fabric.gateway.access import declarations
from fabric.gateway.app import ROUTERS
from fabric.testing.fixed_programs import zeros
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.lora import peft_config, peft_weights

ROUTES = [route for router in ROUTERS for route in router.routes]
SECRET, VAULT, ABSENT = "secret-model", "vault-site", "absent-thing"
ELSEWHERE = {"x-forwarded-for": "203.0.113.5"}
"""The matrix is asked from another machine: what is local may read the metrics."""

Caller = Literal[
    *("nobody", "unknown", "expired", "revoked", "launch token", "ticket"),
    *("scopeless", "admin", "stranger", "member", "owner"),
]
UNIDENTIFIED = ("nobody", "unknown", "expired", "revoked", "ticket")
KNOWN = ("scopeless", "admin", "stranger", "member", "owner")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A hub with the owner's things in it; ``bearers`` are all that can be shown to it."""

    hub: RunningHub
    client: httpx.Client
    bearers: dict[str, str | None]
    made: list[str] = field(default_factory=list)

    def ask(self, caller: str, method: str, path: str, **sent: Any) -> httpx.Response:
        bearer = self.bearers[caller]
        headers = ELSEWHERE if bearer is None else ELSEWHERE | {"authorization": f"Bearer {bearer}"}
        return self.client.request(method, path, headers=headers, **sent)

    def make(self, method: str, path: str, name: str = "id", **sent: Any) -> str:
        """Make something of the owner's; return what it is called."""
        reply = self.ask("owner", method, path, **sent)
        assert reply.status_code == 200, reply.text
        made = str(reply.json()[name])
        self.made.append(made)
        return made

    # ---- things of the owner's -------------------------------------------------------------------

    def file(self) -> str:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": COMPLETION}
        sent = {"files": {"file": ("in.jsonl", json.dumps(line))}, "data": {"purpose": "batch"}}
        return self.make("POST", "/v1/files", **sent)

    def batch(self) -> str:
        body = {"input_file_id": self.file(), "endpoint": "/v1/completions"}
        return self.make("POST", "/v1/batches", json=body | {"completion_window": "24h"})

    def adapter(self) -> str:
        name = f"mine-{len(self.made)}"
        return self.make("POST", "/v1/fabric/adapters", "name", **lora(name, SECRET))

    def artifact(self) -> str:
        return self.make("PUT", "/v1/fabric/artifacts", content=zeros({"w": ("F32", (3,))}))

    def ticket(self) -> str:
        return self.make("POST", "/v1/fabric/tickets", json={"site": VAULT})

    def run(self) -> str:
        reply = self.ask("owner", "POST", "/v1/completions", json=COMPLETION)
        run = str(reply.json()["fabric"]["run"])
        path = f"/v1/fabric/runs/{run}"
        wait_until(
            lambda: self.ask("owner", "GET", path).json().get("state") == "completed", timeout_s=30
        )
        self.made.append(run)
        return run

    def instance(self) -> str:
        body = {"model": SECRET, "machine": "laptop"}
        return self.make("POST", "/v1/fabric/instances", "instance", json=body)

    def launch(self) -> str:
        body = {"model": SECRET, "site": "alpha"}
        return self.make("POST", "/v1/fabric/launches", "instance", json=body)

    def ended(self) -> str:
        launch = self.launch()
        self.hub.catalog.end_launch(launch, "over")
        return launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How a route is called, and what becomes of it.

    Attributes:
        about: ``mine``: an object of the owner's by its name; ``private``: a model or site that
            was granted to the owner's project; ``site``: the agent's own site; ``list``: what the
            caller may know of; ``all``: everything, for operators; ``any``: nothing of anybody's.
        sent: The body: of the call for the object, whose name it is given.
        thing: Makes the owner's object and returns its name.
        ok: What those get who may.
        instance: What an instance's token gets, where instances call.
        path: In place of the route's own, with its parameters filled in.
    """

    about: Literal["mine", "private", "site", "list", "all", "any"] = "any"
    sent: Callable[[str], dict[str, Any]] = lambda _: {}
    thing: Callable[[World], str] = lambda _: ""
    ok: frozenset[int] = frozenset({200})
    instance: frozenset[int] = frozenset({401})
    path: str = ""


COMPLETION = {"model": MODEL, "prompt": "x", "max_tokens": 1}
NODES = [{"op": "read", "at": "layers.1.out"}, {"op": "save", "name": "h", "x": 0}]
PROGRAM = {"runs": [{"id": "a", "ids": [1, 2], "nodes": NODES}]}
REACH = {
    "endpoint_id": "6c91e6eb-085c-11e6-a7a5-22000bf2d559",
    "run_dir": "/tmp/run",
    "direct_token": "t",
}
JOB = {
    **{"launch": "l-00000000", "job_id": "7", "num_nodes": 1, "elapsed_s": 60, "charge": "0.5"},
    **{"unit": "node-hours", "source": "sacct", "ended_at": "2030-01-01T00:00:00Z"},
}
NO_CONTENT, NOT_THERE = frozenset({204}), frozenset({404})


def lora(name: str, model: str) -> dict[str, Any]:
    content = {"config": peft_config(), "weights": peft_weights()}
    return {
        "data": {"name": name, "model": model},
        "files": {part: (part, data) for part, data in content.items()},
    }


def body(**fields: Any) -> Callable[[str], dict[str, Any]]:
    """Return a JSON body; where a field is ``...`` the object's name belongs."""
    return lambda name: {"json": {k: name if v is ... else v for k, v in fields.items()}}


def secret(_: World) -> str:
    return SECRET


def vault(_: World) -> str:
    return VAULT


def mine(thing: Callable[[World], str], **options: Any) -> Call:
    return Call(about="mine", thing=thing, **options)


def private(sent: Callable[[str], dict[str, Any]], **options: Any) -> Call:
    return Call(about="private", thing=options.pop("thing", secret), sent=sent, **options)


LIST, ANY = Call(about="list"), Call()
AT_VAULT = private(lambda name: {"json": COMPLETION | {"fabric": {"sites": [name]}}}, thing=vault)
F = "/v1/fabric"
MATRIX: dict[tuple[str, str], list[Call]] = {
    ("GET", "/v1/models"): [LIST],
    ("GET", "/v1/models/{name:path}"): [
        private(lambda _: {}, path="/v1/models/{}"),
        private(lambda _: {}, path="/v1/models/{}@1"),
    ],
    ("POST", "/v1/completions"): [private(body(**COMPLETION | {"model": ...})), AT_VAULT],
    ("POST", "/v1/chat/completions"): [
        private(body(model=..., max_tokens=1, messages=[{"role": "user", "content": "x"}]))
    ],
    ("POST", "/v1/embeddings"): [private(body(model=..., input="x"))],
    ("POST", "/v1/files"): [
        Call(sent=lambda _: {"files": {"file": ("a", b"{}")}, "data": {"purpose": "batch"}})
    ],
    ("GET", "/v1/files"): [LIST],
    ("GET", "/v1/files/{file}"): [mine(World.file)],
    ("GET", "/v1/files/{file}/content"): [mine(World.file)],
    ("DELETE", "/v1/files/{file}"): [mine(World.file)],
    ("POST", "/v1/batches"): [
        mine(
            World.file,
            sent=body(input_file_id=..., endpoint="/v1/completions", completion_window="24h"),
            path="/v1/batches",
        )
    ],
    ("GET", "/v1/batches"): [LIST],
    ("GET", "/v1/batches/{batch}"): [mine(World.batch)],
    ("POST", "/v1/batches/{batch}/cancel"): [mine(World.batch, ok=frozenset({200, 409}))],
    ("GET", f"{F}/sites"): [LIST],
    ("GET", f"{F}/models"): [LIST],
    ("POST", f"{F}/explain"): [
        private(body(**COMPLETION | {"model": ...})),
        private(body(model=..., program=PROGRAM)),
        Call(about="list", sent=body(**COMPLETION)),
    ],
    ("POST", f"{F}/estimate"): [
        private(body(model=..., num_requests=10, prompt_tokens=8, output_tokens=8)),
        private(
            lambda name: {
                "json": {
                    **{"model": MODEL, "num_requests": 10, "prompt_tokens": 8, "output_tokens": 8},
                    "sites": [name],
                }
            },
            thing=vault,
        ),
    ],
    ("GET", f"{F}/queue"): [LIST],
    ("GET", f"{F}/slo"): [LIST],
    ("GET", f"{F}/usage"): [LIST],
    ("GET", f"{F}/spend"): [LIST],
    ("GET", f"{F}/runs"): [LIST],
    ("GET", f"{F}/runs/{{run}}"): [mine(World.run)],
    ("GET", f"{F}/whoami"): [LIST],
    ("POST", f"{F}/adapters"): [private(lambda name: lora("new", name))],
    ("GET", f"{F}/adapters"): [LIST],
    ("GET", f"{F}/adapters/{{name}}"): [mine(World.adapter)],
    ("DELETE", f"{F}/adapters/{{name}}"): [mine(World.adapter)],
    ("GET", f"{F}/adapter-files/{{digest}}"): [
        Call(path=f"{F}/adapter-files/blake3:{'0' * 64}", instance=NOT_THERE)
    ],
    ("POST", f"{F}/programs"): [
        private(body(model=..., program=PROGRAM)),
        private(body(model=..., program=PROGRAM, quote=True)),
    ],
    ("GET", f"{F}/points"): [private(lambda name: {"params": {"model": name}})],
    ("GET", f"{F}/programs/schema"): [ANY],
    ("PUT", f"{F}/artifacts"): [Call(sent=lambda _: {"content": zeros({"w": ("F32", (3,))})})],
    ("GET", f"{F}/artifacts/{{artifact}}"): [mine(World.artifact)],
    ("DELETE", f"{F}/artifacts/{{artifact}}"): [mine(World.artifact)],
    ("GET", f"{F}/instance/artifacts"): [
        Call(
            thing=World.artifact,
            sent=lambda name: {"params": {"artifact": name, "run": "run_of_another"}},
            instance=NOT_THERE,
        )
    ],
    ("PUT", f"{F}/instance/artifacts"): [
        Call(
            thing=World.artifact,
            sent=lambda name: {"params": {"artifact": name, "run": "run_of_another", "part": "p"}},
            instance=NOT_THERE,
        )
    ],
    ("GET", f"{F}/instance/weights"): [Call(instance=frozenset({200}))],
    ("PUT", f"{F}/instance/weights"): [
        Call(sent=body(url="http://n1:1", key="0" * 64), instance=NO_CONTENT),
        *(
            Call(sent=body(url=url, key=key), instance=frozenset({400}))
            for url, key in (
                ("http://n1", "0" * 64),
                ("https://n1:1", "0" * 64),
                ("http://n1:1/path", "0" * 64),
                ("http://user@n1:1", "0" * 64),
                ("http://n1:1", "short"),
            )
        ),
    ],
    ("POST", f"{F}/tickets"): [private(body(site=...), thing=vault)],
    ("GET", f"{F}/tickets"): [LIST],
    ("DELETE", f"{F}/tickets/{{ticket}}"): [mine(World.ticket)],
    ("POST", f"{F}/launches"): [Call(about="site", sent=body(site="alpha", model=MODEL))],
    ("POST", f"{F}/launches/{{instance}}/end"): [
        mine(World.launch, sent=body(reason="over"), ok=NO_CONTENT)
    ],
    ("POST", f"{F}/launches/{{instance}}/reach"): [
        mine(World.ended, sent=body(**REACH), ok=NO_CONTENT)
    ],
    ("POST", f"{F}/launches/{{instance}}/outlook"): [
        mine(World.launch, sent=body(ready_in_s=5), ok=NO_CONTENT)
    ],
    ("POST", f"{F}/sites/{{site}}/status"): [
        Call(about="site", path=f"{F}/sites/alpha/status", sent=body(state="ready"), ok=NO_CONTENT)
    ],
    ("POST", f"{F}/instances"): [private(body(model=..., machine="laptop"))],
    ("GET", f"{F}/instances"): [LIST],
    # Nothing of the owner's is connected; whose it is was asked before.
    ("POST", f"{F}/instances/{{instance}}/drain"): [mine(World.instance, ok=NOT_THERE)],
    ("POST", f"{F}/instances/{{instance}}/outlook"): [
        mine(World.instance, sent=body(ready_in_s=5))
    ],
    ("POST", f"{F}/instances/{{instance}}/job"): [mine(World.instance, sent=body(**JOB))],
    ("POST", f"{F}/instances/{{instance}}/balance"): [
        mine(World.instance, sent=body(account="m1", unit="node-hours", available=3))
    ],
    ("POST", f"{F}/instances/{{instance}}/end"): [mine(World.instance, sent=body(reason="over"))],
    ("GET", f"{F}/functions"): [LIST],
    ("WEBSOCKET", f"{F}/session"): [ANY],
    ("GET", "/healthz"): [LIST],
    ("GET", "/metrics"): [Call(about="all")],
    ("GET", "/openapi.json"): [LIST],
}


def keyed(route: Any) -> list[tuple[str, str]]:
    if isinstance(route, APIWebSocketRoute):
        return [("WEBSOCKET", route.path)]
    assert isinstance(route, APIRoute)
    return [(method, route.path) for method in sorted(route.methods)]


TABLE = {key: declarations(route)[0] for route in ROUTES for key in keyed(route)}
CALLS = [
    pytest.param(key, call, id=f"{key[0]} {key[1]} {number}")
    for key, calls in MATRIX.items()
    for number, call in enumerate(calls)
    if key[0] != "WEBSOCKET"
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_hub(tmp_path_factory.mktemp("matrix"), sites=["alpha", "beta", VAULT]) as hub:
        for project in ("chemistry", "operators"):
            hub.keys.add_project(project)
        hub.ledger.grant(hub.ledger.open_allocation("chemistry", "*"), 10**12)
        digest = hub.catalog.resolve(MODEL).digest
        hub.catalog.add_model(SECRET, "1", context_tokens=2048, source="x:", digest=digest)
        hub.grants.add(f"project:{PROJECT}", model=SECRET)
        hub.grants.add(f"project:{PROJECT}", site=VAULT)
        hub.ledger.set_rate(
            *("*", "*"), prompt_usu=1, cached_prompt_usu=1, output_usu=2, device_usu=1
        )
        with httpx.Client(base_url=hub.base_url, timeout=30) as client:
            yield World(hub=hub, client=client, bearers=get_bearers(hub))


def get_bearers(hub: RunningHub) -> dict[str, str | None]:
    add, all_scopes = hub.keys.add_key, SCOPES - {"admin"}
    record, revoked = add(PROJECT, scopes=all_scopes, site="alpha")
    hub.keys.revoke(record.id)
    past = datetime.now(UTC) - timedelta(hours=1)
    owner = add(PROJECT, scopes=all_scopes, site="alpha")[1]
    issuer = hub.keys.authenticate(owner)
    return {
        "nobody": None,
        "unknown": "fab_000000000000_" + "x" * 43,
        "expired": add(PROJECT, scopes=all_scopes, site="alpha", expires_at=past)[1],
        "revoked": revoked,
        "launch token": hub.catalog.add_launch("alpha", MODEL)[1],
        "ticket": hub.keys.tickets.add(issuer, "alpha")[1],
        "scopeless": add(PROJECT, scopes=())[1],
        "admin": add("operators", scopes=["admin"])[1],
        "stranger": add("chemistry", scopes=all_scopes, site="beta")[1],
        "member": add(PROJECT, scopes=all_scopes, site="alpha")[1],
        "owner": owner,
    }


def expected(needs: access.Access, call: Call, caller: str) -> frozenset[int]:
    """Return what a caller gets, by what the route declares and whose the object is."""
    if isinstance(needs, access.Public):
        return call.ok
    if isinstance(needs, access.NeedsInstance):
        return call.instance if caller == "launch token" else frozenset({401})
    if caller not in KNOWN:
        return frozenset({401})
    assert isinstance(needs, access.Needs)
    scopes = {"scopeless": set(), "admin": {"admin"}}.get(caller, SCOPES - {"admin"})
    if needs.scope is not None and needs.scope not in scopes:
        return frozenset({403})
    is_stranger = caller in ("stranger", "admin")
    if is_stranger and call.about == "site":
        return frozenset({403})
    if is_stranger and call.about in ("mine", "private"):
        return NOT_THERE
    return call.ok


def test_every_route_has_its_entry() -> None:
    assert set(MATRIX) == set(TABLE), "a route without an entry, or an entry without a route"


def test_every_operation_of_the_openapi_document_has_its_entry(world: World) -> None:
    paths = world.ask("nobody", "GET", "/openapi.json").json()["paths"]
    known = {(method, path.replace(":path", "")) for method, path in MATRIX}
    for path, operations in paths.items():
        for method in operations:
            assert (method.upper(), path) in known


@pytest.mark.parametrize(("key", "call"), CALLS)
def test_each_caller_gets_what_the_matrix_says(
    world: World, key: tuple[str, str], call: Call
) -> None:
    method, route = key
    name = call.thing(world)
    for caller in world.bearers:
        if caller in ("member", "owner"):
            # The caller before may have used it up.
            name = call.thing(world)
        path = (call.path or re.sub(r"\{[^}]*\}", "{}", route)).format(name)
        reply = world.ask(caller, method, path, **call.sent(name))
        told = f"{caller}: {reply.status_code} {reply.text[:300]}"
        assert reply.status_code in expected(TABLE[key], call, caller), told
        if caller not in ("owner", "member", "scopeless") and call.about != "all":
            assert_nothing_told(world, reply, known=(name, path))
        if reply.status_code == 404 and caller == "stranger":
            unheard = world.ask(
                caller, method, (call.path or path).replace(name, ABSENT).format(ABSENT),
                **call.sent(ABSENT),
            )  # fmt: skip
            assert as_if(reply, name) == as_if(unheard, ABSENT)


def assert_nothing_told(world: World, reply: httpx.Response, known: tuple[str, ...]) -> None:
    for hidden in (SECRET, VAULT, PROJECT, *world.made[-20:]):
        if not any(hidden in said for said in known):
            assert hidden not in reply.text


def as_if(reply: httpx.Response, name: str) -> tuple[int, str]:
    """Return a reply as it would be if a thing had no name."""
    return reply.status_code, reply.text.replace(name, "*")


def test_no_key_opens_a_session(world: World) -> None:
    for caller, bearer in world.bearers.items():
        if caller == "launch token":
            continue
        headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
        with connect(world.hub.session_url, additional_headers=headers) as socket:
            with suppress(ConnectionClosed):
                socket.recv(timeout=20)
            assert socket.close_code == access.CLOSE_BAD_TOKEN, caller


LOOKUPS = re.compile(r"hub\.catalog\.(resolve|models|sites|get_site)\b")
BEHIND_A_CHECK = {
    # The hub's health says no name; the others come after the check of the same model, or look for
    # what belongs to the caller.
    "operations.py": 1,
    "own_instances.py": 3,
    "weights_routes.py": 2,
}


def test_routes_look_things_up_with_their_callers_eyes() -> None:
    found = {
        path.name: len(LOOKUPS.findall(path.read_text()))
        for path in Path(access.__file__).parent.glob("*.py")
    }
    assert {name: number for name, number in found.items() if number} == BEHIND_A_CHECK
