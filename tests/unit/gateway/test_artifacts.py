"""Constants that programs are given and results they leave: stored, fetched, and whose they are."""

from __future__ import annotations

import base64
import hashlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from fabric.artifacts import ArtifactSettings
from fabric.messages.program import MAX_INLINE_BYTES
from fabric.programs import read_header
from fabric.testing.fixed_programs import HIDDEN, zeros
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

SCOPES = ("query", "program:read", "program:write")
READ: dict[str, Any] = {"op": "read", "at": "layers.1.out"}
SAVE: dict[str, Any] = {"op": "save", "name": "h", "x": 0}
LARGE = (2**18, HIDDEN)
"""A shape of eight megabytes."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    settings = ArtifactSettings(project_bytes=40 * 2**20)
    path = tmp_path_factory.mktemp("artifacts")
    with running_hub(path, sites=["alpha", "beta"], artifacts=settings) as hub:
        hub.keys.add_project("chemistry")
        hub.ledger.grant(hub.ledger.open_allocation("chemistry", "*"), 10**12)
        yield hub


@pytest.fixture
def connect(hub: RunningHub) -> Iterator[Callable[[str], httpx.Client]]:
    opened: list[httpx.Client] = []

    def make(project: str = PROJECT) -> httpx.Client:
        _, key = hub.keys.add_key(project, scopes=SCOPES)
        headers = {"authorization": f"Bearer {key}"}
        opened.append(httpx.Client(base_url=hub.base_url, headers=headers, timeout=30))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


@pytest.fixture
def client(connect: Callable[..., httpx.Client]) -> httpx.Client:
    return connect()


@pytest.fixture
def by_handle(hub: RunningHub) -> Iterator[None]:
    """Engines keep every result instead of sending it inline."""
    engines = [site.engine for site in hub.sites.values()]
    for engine in engines:
        engine.inline_bytes = 0
    yield
    for engine in engines:
        engine.inline_bytes = MAX_INLINE_BYTES


def upload(client: httpx.Client, data: bytes) -> Any:
    reply = client.put("/v1/fabric/artifacts", content=data)
    assert reply.status_code == 200, reply.text
    return reply.json()


def post(client: httpx.Client, *nodes: dict[str, Any], **fields: Any) -> httpx.Response:
    runs = [{"id": "a", "ids": [1, 2], "nodes": list(nodes or (READ, SAVE))}]
    body = {"model": MODEL, "program": {"runs": runs, **fields}}
    return client.post("/v1/fabric/programs", json=body)


def run_of(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    (run,) = reply.json()["runs"]
    return run


def handle_of(data: bytes, artifact: str) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "handle": {"artifact": artifact},
    }


def refused(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


# ---- users ---------------------------------------------------------------------------------------


def test_constants_are_stored_fetched_and_deleted(client: httpx.Client) -> None:
    data = zeros({"w": ("F32", (3,))})
    kept = upload(client, data)
    assert (kept["size"], kept["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    path = f"/v1/fabric/artifacts/{kept['id']}"
    reply = client.get(path)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.content == data
    assert client.delete(path).json()["deleted"]
    assert refused(client.get(path)) == (404, "not_found")
    assert refused(client.delete(path)) == (404, "not_found")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 8, b"not safetensors", zeros({"w": ("F32", (3,))})[:-1]],
    ids=["empty", "a long header", "text", "cut"],
)
def test_what_is_no_safetensors_file_is_not_kept(client: httpx.Client, data: bytes) -> None:
    reply = client.put("/v1/fabric/artifacts", content=data)
    assert reply.status_code in (400, 413)
    assert reply.json()["error"]["code"] in ("program_invalid", "program_too_large")


def test_uploads_have_a_limit(hub: RunningHub, client: httpx.Client) -> None:
    address = httpx.URL(hub.base_url)
    with socket.create_connection((address.host, address.port or 80), timeout=10) as wire:
        head = f"PUT /v1/fabric/artifacts HTTP/1.1\r\nhost: x\r\ncontent-length: {2**40}\r\n"
        wire.sendall(f"{head}authorization: {client.headers['authorization']}\r\n\r\n".encode())
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")


def test_anothers_artifact_is_none_at_all(connect: Callable[..., httpx.Client]) -> None:
    ours, theirs = connect(), connect("chemistry")
    data = zeros({"w": ("F32", (HIDDEN,))})
    kept = upload(ours, data)
    missing = "art_" + "0" * 32
    for artifact in (kept["id"], missing):
        path = f"/v1/fabric/artifacts/{artifact}"
        assert refused(theirs.get(path)) == (404, "not_found")
        assert refused(theirs.delete(path)) == (404, "not_found")
        taking = {"op": "artifact", "id": artifact, "run": "a", "save": "w"}
        assert refused(post(theirs, taking, SAVE)) == (404, "not_found")
        assert refused(post(theirs, consts=handle_of(data, artifact))) == (404, "not_found")
    assert ours.get(f"/v1/fabric/artifacts/{kept['id']}").content == data


def test_a_full_project_keeps_nothing_more(connect: Callable[..., httpx.Client]) -> None:
    client = connect("chemistry")
    kept = []
    while True:
        reply = client.put("/v1/fabric/artifacts", content=zeros({f"w{len(kept)}": ("F32", LARGE)}))
        if reply.status_code != 200:
            break
        kept.append(reply.json()["id"])
    assert refused(reply) == (413, "artifacts_full")
    assert len(kept) == 4
    for artifact in kept:
        client.delete(f"/v1/fabric/artifacts/{artifact}")
    upload(client, zeros({"w": ("F32", (3,))}))


def test_expired_artifacts_are_none_at_all(tmp_path: Any) -> None:
    settings = ArtifactSettings(ttl_s=0.0)
    with running_hub(tmp_path, sites=["alpha"], artifacts=settings) as hub:
        _, key = hub.keys.add_key(PROJECT, scopes=SCOPES)
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=hub.base_url, headers=headers) as client:
            reply = client.put("/v1/fabric/artifacts", content=zeros({"w": ("F32", (3,))}))
            assert refused(reply) == (404, "not_found")
            missing = post(client, consts=handle_of(b"12345678", "art_" + "0" * 32))
            assert refused(missing) == (404, "not_found")


# ---- programs ------------------------------------------------------------------------------------


def test_large_constants_go_by_handle_and_reach_the_engine(client: httpx.Client) -> None:
    data = zeros({"w": ("F32", LARGE)})
    kept = upload(client, data)
    reply = post(
        client,
        {"op": "const", "name": "w"},
        {"op": "mean", "x": 0, "axes": [0]},
        {**SAVE, "x": 1},
        consts=handle_of(data, kept["id"]),
    )
    run = run_of(reply)
    assert read_header(base64.b64decode(run["data"]))["h"].shape == (HIDDEN,)
    assert reply.json()["usage"]["hook_bytes_in"] == len(data)


@pytest.mark.parametrize("change", [{"size": 9}, {"sha256": "0" * 64}])
def test_a_handle_must_lead_to_what_is_declared(
    client: httpx.Client, change: dict[str, Any]
) -> None:
    data = zeros({"w": ("F32", (3,))})
    declared = {**handle_of(data, upload(client, data)["id"]), **change}
    assert refused(post(client, consts=declared)) == (400, "program_invalid")


@pytest.mark.usefixtures("by_handle")
def test_a_result_by_handle_is_its_projects_and_goes_into_the_next_program(
    hub: RunningHub, connect: Callable[..., httpx.Client]
) -> None:
    client = connect()
    kept = run_of(post(client))
    assert (kept["data"], kept["names"]) == (None, ["h"])
    handle = kept["handle"]
    contents = client.get(f"/v1/fabric/artifacts/{handle['id']}").content
    assert len(contents) == kept["size"] == handle["size"]
    assert read_header(contents)["h"].shape == (2, HIDDEN)
    theirs = connect("chemistry")
    assert theirs.get(f"/v1/fabric/artifacts/{handle['id']}").status_code == 404

    taking = {"op": "artifact", "id": handle["id"], "run": "a", "save": "h"}
    own = zeros({"w": ("F32", (HIDDEN,))})
    constants = {**handle_of(own, ""), "data": base64.b64encode(own).decode()}
    del constants["handle"]
    nodes = (taking, {"op": "const", "name": "w"}, {"op": "add", "x": 0, "y": 1})
    again = run_of(post(client, *nodes, {**SAVE, "x": 2}, consts=constants))
    assert again["size"] == kept["size"]
    for wrong, reason in ((("b", "h"), "'a', not 'b'"), (("a", "g"), "no tensor 'g'")):
        run, save = wrong
        reply = post(client, {**taking, "run": run, "save": save}, SAVE)
        assert refused(reply) == (400, "program_invalid")
        assert reason in reply.json()["error"]["message"]


@pytest.mark.usefixtures("by_handle")
def test_a_stream_names_what_is_kept(client: httpx.Client) -> None:
    body = {
        "model": MODEL,
        "stream": True,
        "program": {"runs": [{"id": "a", "ids": [1], "nodes": [READ, {**SAVE, "stream": True}]}]},
    }
    reply = client.post("/v1/fabric/programs", json=body)
    assert '"handle": {"id": "art_' in reply.text.split("\n\n")[0]


@pytest.mark.usefixtures("by_handle")
def test_a_project_that_is_full_gets_its_error_and_its_hold_back(
    hub: RunningHub, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ArtifactSettings(project_bytes=1)
    monkeypatch.setattr(hub.artifacts, "settings", full)
    assert refused(post(client)) == (413, "artifacts_full")
    wait_until(lambda: all(one.held_usu == 0 for one in hub.ledger.allocations(PROJECT)))


# ---- instances -----------------------------------------------------------------------------------

LEAVE = "/v1/fabric/instance/artifacts"


def test_an_instance_reaches_only_what_its_runs_are_about(
    hub: RunningHub, client: httpx.Client
) -> None:
    data = zeros({"w": ("F32", (3,))})
    kept = upload(client, data)
    alpha, beta = hub.sites["alpha"], hub.sites["beta"]
    tokens = {}
    for site in (alpha, beta):
        _, tokens[site.name] = hub.catalog.add_launch(site.name, MODEL)
    for engine in (alpha.engine, beta.engine):
        engine.first_token_s = 30.0
    body = {"model": MODEL, "program": {"runs": [{"id": "a", "ids": [1], "nodes": [READ, SAVE]}]}}
    ask = {"artifact": kept["id"], "run": "run_unknown"}
    for token in tokens.values():
        headers = {"authorization": f"Bearer {token}"}
        with httpx.Client(base_url=hub.base_url, headers=headers) as instance:
            assert refused(instance.get(LEAVE, params=ask)) == (404, "not_found")
            params = {**ask, "artifact": "art_" + "1" * 32, "part": "a"}
            assert refused(instance.put(LEAVE, params=params, content=data))[0] == 404
            assert refused(instance.get(LEAVE, params={"run": "x"}))[0] == 400
            # A launch's token is no key, and a key is no launch's token.
            assert refused(instance.get("/v1/models"))[0] == 401
    assert refused(client.get(LEAVE, params=ask)) == (401, "invalid_api_key")
    with client.stream("POST", "/v1/fabric/programs", json={**body, "deadline_s": 1.0}) as reply:
        assert reply.status_code == 504
    for engine in (alpha.engine, beta.engine):
        engine.first_token_s = 0.0
