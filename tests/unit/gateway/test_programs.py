"""Programs over HTTP: quoted, run, streamed, refused."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from fabric.artifacts import ArtifactSettings
from fabric.cli.main import fabric as fabric_command
from fabric.gateway import program_replies
from fabric.messages import RunState
from fabric.programs import json_schema, read_header
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.fixed_programs import HIDDEN, VOCABULARY, zeros
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

SCOPES = ("program:read", "program:write", "program:gradient", "program:weights")
READ: dict[str, Any] = {"op": "read", "at": "layers.1.out"}
SAVE: dict[str, Any] = {"op": "save", "name": "h", "x": 0}
LONG = 2000


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    settings = ArtifactSettings(project_bytes=2**23)
    path = tmp_path_factory.mktemp("programs")
    with running_hub(path, sites=["alpha"], artifacts=settings) as hub:
        hub.ledger.set_rate(
            MODEL,
            "*",
            prompt_usu=1,
            cached_prompt_usu=0,
            output_usu=2,
            hook_in_usu=1,
            hook_out_usu=3,
            device_usu=1000,
        )
        yield hub


@pytest.fixture
def connect(hub: RunningHub) -> Iterator[Callable[..., httpx.Client]]:
    """Return clients with a key of these scopes; closed at the end."""
    opened: list[httpx.Client] = []

    def make(*scopes: str, project: str = PROJECT) -> httpx.Client:
        _, key = hub.keys.add_key(project, scopes=scopes)
        headers = {"authorization": f"Bearer {key}"}
        opened.append(httpx.Client(base_url=hub.base_url, headers=headers, timeout=30))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


@pytest.fixture
def client(connect: Callable[..., httpx.Client]) -> httpx.Client:
    return connect("query", *SCOPES)


@pytest.fixture
def engine(hub: RunningHub) -> Iterator[FixedDelayEngine]:
    """The only site's engine, whose pace and threshold a test may change."""
    engine = hub.sites["alpha"].engine
    before = engine.first_token_s, engine.token_s, engine.inline_bytes
    yield engine
    engine.first_token_s, engine.token_s, engine.inline_bytes = before


def one_run(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    run = {"id": "a", "text": "three words long", "nodes": list(nodes or (READ, SAVE))}
    return {"runs": [{**run, **fields}]}


def constants(file: bytes, **changes: Any) -> dict[str, Any]:
    fields = {
        "sha256": hashlib.sha256(file).hexdigest(),
        "size": len(file),
        "data": base64.b64encode(file).decode(),
    }
    return {**fields, **changes}


def post(client: httpx.Client, program: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "program": program, **fields}
    return client.post("/v1/fabric/programs", json=body)


def ok(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def events(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def is_settled(hub: RunningHub) -> bool:
    return all(one.held_usu == 0 for one in hub.ledger.allocations(PROJECT))


# ---- what comes back -----------------------------------------------------------------------------


def test_a_program_is_quoted_run_charged_at_its_rates_and_recorded_without_its_values(
    hub: RunningHub, client: httpx.Client, engine: FixedDelayEngine
) -> None:
    engine.first_token_s = 0.25
    data = zeros({"secretname": ("F32", (HIDDEN,))})
    nodes = [READ, {"op": "const", "name": "secretname"}, {"op": "add", "x": 0, "y": 1}]
    program = one_run(*nodes, {**SAVE, "x": 2}, gen={"max_tokens": 3})
    program["consts"] = constants(data)
    quote = ok(post(client, program, quote=True))
    assert quote["object"] == "program.quote"
    assert quote["scopes"] == ["program:read"]
    assert quote["hook_bytes_in"] == len(data)
    assert is_settled(hub)

    result = ok(post(client, program))
    (run,) = result["runs"]
    saved = base64.b64decode(run["data"])
    # Five words have been read: three of the prompt and the first two generated.
    assert read_header(saved)["h"].shape == (5, HIDDEN)
    assert (run["names"], run["size"], run["handle"]) == (["h"], len(saved), None)
    assert (run["tokens"], run["text"]) == ([1000, 1001, 1002], "word0 word1 word2")
    assert run["finish_reason"] == "length"
    usage = result["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 3)
    assert (usage["hook_bytes_in"], usage["hook_bytes_out"]) == (len(data), len(saved))
    assert usage["device_s"] == 0.25
    charge = 3 * 1 + 3 * 2 + len(data) * 1 + len(saved) * 3 + 250
    assert result["fabric"]["charge_usu"] == charge <= quote["charge_usu_max"]

    wait_until(lambda: is_settled(hub))
    record = hub.catalog.run(result["id"], project=PROJECT)
    assert record.program == quote["program"]
    assert (record.charge_usu, record.usage.hook_bytes_out) == (charge, len(saved))
    assert "secretname" not in repr(record)
    shown = ok(client.get(f"/v1/fabric/runs/{result['id']}"))
    assert shown["program"] == quote["program"]
    argv = ["runs", result["id"], "--base-url", hub.base_url, "--api-key", hub.api_key]
    printed = CliRunner().invoke(fabric_command, argv)
    assert quote["program"] in printed.output, printed.output
    assert f"{len(data)} in, {len(saved)} out" in printed.output


def test_a_stream_tells_each_step_and_ends_with_the_result(client: httpx.Client) -> None:
    program = one_run(READ, {**SAVE, "stream": True}, gen={"max_tokens": 2})
    *told, result, done = events(post(client, program, stream=True))
    assert done == "[DONE]"
    assert result["object"] == "program.result"
    saves = [one for one in told if one["object"] == "program.saves"]
    assert [(one["run"], one["step"], one["names"]) for one in saves] == [
        ("a", 0, ["h"]),
        ("a", 1, ["h"]),
    ]
    tokens = [one for one in told if one["object"] == "program.token"]
    assert "".join(one["text"] for one in tokens) == result["runs"][0]["text"] == "word0 word1"


def test_what_is_streamed_to_nobody_comes_at_the_end(client: httpx.Client) -> None:
    result = ok(post(client, one_run(READ, {**SAVE, "stream": True})))
    assert result["runs"][0]["names"] == ["h"]


def test_runs_keep_their_order_and_take_from_each_other(client: httpx.Client) -> None:
    taking = [{"op": "saved", "run": "z", "save": "h"}, SAVE]
    runs = [
        {"id": "a", "ids": [1], "nodes": taking},
        {"id": "z", "ids": [1], "nodes": [READ, SAVE]},
    ]
    result = ok(post(client, {"runs": runs}))
    assert [run["id"] for run in result["runs"]] == ["a", "z"]
    shapes = [read_header(base64.b64decode(run["data"]))["h"].shape for run in result["runs"]]
    assert shapes == [(1, HIDDEN), (1, HIDDEN)]


def test_two_at_once_do_not_mix(client: httpx.Client) -> None:
    def ask(length: int) -> int:
        result = ok(post(client, one_run(text=None, ids=list(range(length)))))
        return int(read_header(base64.b64decode(result["runs"][0]["data"]))["h"].shape[0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(1, 17))) == list(range(1, 17))


def test_points_and_schema_are_published(
    hub: RunningHub, connect: Callable[..., httpx.Client]
) -> None:
    client = connect("query")
    points = ok(client.get("/v1/fabric/points", params={"model": MODEL}))
    assert [one["pattern"] for one in points["points"]][:2] == ["embed.out", "layers.{i}.in"]
    assert ok(client.get("/v1/fabric/programs/schema")) == json_schema()
    # What an instance says that is not for the caller does not count for it.
    assert hub.broker.programs.points(points["digest"], {"alpha"}) is not None
    assert hub.broker.programs.points(points["digest"], {"elsewhere"}) is None
    assert refused(client.get("/v1/fabric/points", params={"model": "nope"}))[0] == 404
    assert refused(client.get("/v1/fabric/points"))[0] == 400


def test_a_placement_is_explained(client: httpx.Client) -> None:
    body = {"model": MODEL, "program": one_run()}
    placement = ok(client.post("/v1/fabric/explain", json=body))
    assert placement["site"] == "alpha"
    assert placement["candidates"][0]["excluded"] is None


# ---- permissions ---------------------------------------------------------------------------------

WRITE = {"op": "write", "at": "layers.1.out", "mode": "scale", "alpha": 0.0}
NEEDS: dict[str, tuple[dict[str, Any], ...]] = {
    "program:read": (READ, SAVE),
    "program:write": (WRITE,),
    "program:weights": ({"op": "weight.read", "name": "head.weight", "stats": True}, SAVE),
    "program:gradient": (
        {"op": "read", "at": "logits"},
        {"op": "sum", "x": 0},
        {"op": "grad", "scalar": 1, "wrt": "layers.0.out"},
        {**SAVE, "x": 2},
    ),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_each_permission_is_asked_for_by_name(
    hub: RunningHub, connect: Callable[..., httpx.Client], scope: str
) -> None:
    program = one_run(*NEEDS[scope])
    others = [one for one in SCOPES if one != scope]
    reply = post(connect("query", *others), program)
    assert refused(reply) == (403, "permission_denied")
    assert reply.json()["error"]["detail"]["scope"] == scope
    assert is_settled(hub)
    ok(post(connect("program:read", scope), program))


def test_a_key_has_none_of_them_by_default(hub: RunningHub) -> None:
    headers = {"authorization": f"Bearer {hub.api_key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers) as plain:
        assert refused(post(plain, one_run())) == (403, "permission_denied")
        assert refused(plain.put("/v1/fabric/artifacts", content=b""))[0] == 403


# ---- bad input -----------------------------------------------------------------------------------

TENSORS = zeros({"w": ("F32", (HIDDEN,))})
LYING = TENSORS.replace(b"[8]", b"[9]")


@pytest.mark.parametrize(
    ("program", "refusal"),
    [
        ({}, (400, "invalid_parameter")),
        ({"runs": []}, (400, "invalid_parameter")),
        ({"runs": [{"id": "a"}]}, (400, "invalid_parameter")),
        (one_run({"op": "exec", "code": "1"}), (400, "invalid_parameter")),
        (one_run({**READ, "code": "1"}), (400, "unknown_parameter")),
        (one_run(*[READ] * 10_000), (400, "invalid_parameter")),
        (one_run({**READ, "at": "layers.7.out"}), (400, "point_unknown")),
        (one_run({**READ, "at": "layers.0.attn.scores"}), (422, "point_refused")),
        (one_run(READ, {**SAVE, "x": 5}), (400, "program_invalid")),
        (one_run(READ, {**SAVE, "x": 1}), (400, "program_invalid")),
        (
            one_run({**READ, "sel": {"pos": [99]}}, SAVE, text=None, ids=[1]),
            (400, "program_invalid"),
        ),
        (one_run({"op": "zeros", "shape": [2**30]}, SAVE), (413, "program_too_large")),
        (one_run(text=None, ids=[VOCABULARY]), (400, "program_invalid")),
        (one_run(gen={"max_tokens": 4096}), (400, "program_invalid")),
        (one_run(limits=1), (400, "unknown_parameter")),
        ({**one_run(), "limits": {"result_bytes": 8}}, (413, "program_too_large")),
        ({**one_run(), "consts": constants(LYING)}, (400, "program_invalid")),
        ({**one_run(), "consts": constants(TENSORS, size=9)}, (400, "program_invalid")),
        ({**one_run(), "consts": constants(TENSORS, sha256="0" * 64)}, (400, "program_invalid")),
        ({**one_run(), "consts": constants(TENSORS, data="?")}, (400, "program_invalid")),
        ({**one_run(), "consts": constants(TENSORS, handle={})}, (400, "invalid_parameter")),
        (
            {**one_run(), "consts": constants(TENSORS, data=None, handle={"path": "/etc/passwd"})},
            (400, "program_invalid"),
        ),
        (
            {**one_run(), "consts": constants(bytes(5 * 2**20))},
            (413, "program_too_large"),
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name_and_nothing_held(
    hub: RunningHub, client: httpx.Client, program: dict[str, Any], refusal: tuple[int, str]
) -> None:
    assert refused(post(client, program)) == refusal
    assert is_settled(hub)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"model": "nope"}, (404, "model_not_found")),
        ({"tier": "gold"}, (400, "invalid_parameter")),
        ({"deadline_s": 0}, (400, "invalid_parameter")),
        ({"policy": "local-only"}, (400, "invalid_parameter")),
        ({"sites": ["gamma"]}, (404, "site_not_found")),
        ({"temperature": 1}, (400, "unknown_parameter")),
    ],
)
def test_wrong_options_are_named(
    client: httpx.Client, fields: dict[str, Any], refusal: tuple[int, str]
) -> None:
    assert refused(post(client, one_run(), **fields)) == refusal


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"program": NaN}', b"\xff"])
def test_bodies_that_are_none_are_refused(client: httpx.Client, body: bytes) -> None:
    assert client.post("/v1/fabric/programs", content=body).status_code == 400


def test_a_save_of_four_gigabytes_never_reaches_the_engine(
    client: httpx.Client, engine: FixedDelayEngine
) -> None:
    wide = {"op": "zeros", "shape": [2**15, 2**15]}
    program = {**one_run(wide, SAVE), "limits": {"result_bytes": 2**30}}
    for tier in ("interactive", "standard", "batch"):
        assert refused(post(client, program, tier=tier)) == (413, "program_too_large")
    assert engine.load().num_running == 0


def test_a_program_nobody_can_pay_for_is_refused(
    hub: RunningHub, connect: Callable[..., httpx.Client]
) -> None:
    hub.keys.add_project("poor")
    reply = post(connect(*SCOPES, project="poor"), one_run())
    assert refused(reply) == (402, "insufficient_balance")


def test_a_key_has_no_more_programs_in_flight_than_it_may(
    hub: RunningHub, engine: FixedDelayEngine
) -> None:
    engine.first_token_s = 0.5
    _, key = hub.keys.add_key(PROJECT, scopes=SCOPES, max_concurrent=2)
    headers = {"authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=hub.base_url, headers=headers, timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        replies = list(pool.map(lambda _: post(client, one_run()), range(8)))
    codes = sorted(reply.status_code for reply in replies)
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 2


def test_a_programs_values_are_in_no_log_and_no_table(
    hub: RunningHub, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    program = one_run(text="canaryprompt and more", id="canaryrun")
    program["consts"] = constants(zeros({"canaryname": ("F32", (3,))}))
    ok(post(client, program))
    refused(post(client, {**program, "limits": {"result_bytes": 1}}))
    assert "canary" not in caplog.text
    directory = hub.files_dir.parent
    for path in directory.glob("hub.sqlite*"):
        assert b"canary" not in path.read_bytes()


# ---- the middle of things ------------------------------------------------------------------------


def test_a_client_that_leaves_frees_the_rows_and_the_hold(
    hub: RunningHub, client: httpx.Client, engine: FixedDelayEngine
) -> None:
    engine.token_s = 0.05
    body = {"model": MODEL, "program": one_run(gen={"max_tokens": 1000}), "stream": True}
    with client.stream("POST", "/v1/fabric/programs", json=body) as reply:
        run = reply.headers["x-request-id"]
        assert reply.status_code == 200, reply.read()
        pieces = reply.iter_bytes()
        assert b"program.token" in next(pieces)
        assert engine.load().num_running == 1
    wait_until(lambda: engine.load().num_running == 0)
    wait_until(lambda: is_settled(hub))
    record = hub.catalog.run(run, project=PROJECT)
    assert record.state is RunState.CANCELLED
    assert 0 < record.usage.output_tokens < 1000


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    client: httpx.Client, engine: FixedDelayEngine
) -> None:
    engine.fail_after = 2
    try:
        program = one_run(gen={"max_tokens": 5})
        *told, last = events(post(client, program, stream=True))
        assert [one["object"] for one in told] == ["program.token"] * 2
        assert last["error"]["code"] == "row_failed" or last["error"]["code"] == "stream_broken"
        assert post(client, program).status_code >= 500
    finally:
        engine.fail_after = None


def test_results_beyond_what_a_reply_holds_are_kept(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_replies, "MAX_REPLY_BYTES", 200)
    runs = [{"id": name, "ids": [1], "nodes": [READ, SAVE]} for name in "abc"]
    first, *others = ok(post(client, {"runs": runs}))["runs"]
    assert first["data"] is not None
    for one in others:
        assert one["data"] is None
        kept = client.get(f"/v1/fabric/artifacts/{one['handle']['id']}").content
        assert kept == base64.b64decode(first["data"])


def test_an_instance_killed_in_the_middle_ends_the_stream_with_a_typed_error(
    tmp_path: Any,
) -> None:
    with running_hub(tmp_path, sites=["alpha"]) as hub:
        hub.sites["alpha"].engine.token_s = 0.05
        _, key = hub.keys.add_key(PROJECT, scopes=SCOPES)
        headers = {"authorization": f"Bearer {key}"}
        body = {"model": MODEL, "program": one_run(gen={"max_tokens": 1000}), "stream": True}
        with (
            httpx.Client(base_url=hub.base_url, headers=headers, timeout=30) as client,
            client.stream("POST", "/v1/fabric/programs", json=body) as reply,
        ):
            pieces = reply.iter_text()
            first = next(pieces)
            killing = threading.Thread(target=hub.kill_site, args=("alpha",))
            killing.start()
            rest = "".join(pieces)
            killing.join()
        assert "program.token" in first
        assert "[DONE]" not in rest
        assert json.loads(rest.split("data: ")[-1])["error"]["code"] == "stream_broken"
        wait_until(lambda: is_settled(hub))
