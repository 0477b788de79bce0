"""Traces against a real hub whose model answers with zeros in the right shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fabric
from fabric.cli.main import fabric as command
from fabric.errors import (
    FabricError,
    HubUnreachable,
    NotFound,
    PermissionDenied,
    PointRefused,
    ProgramInvalid,
    ProgramTooLarge,
    TraceError,
    UnknownModel,
)
from fabric.messages.program import ProgramLimits
from fabric.sdk import Fabric
from fabric.sdk.arrays import read_tensors
from fabric.sdk.files import write_program
from fabric.sdk.programs import ProgramEvent, RunToken, StepSaves
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub

SCOPES = ("query", "program:read", "program:write")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=["alpha"]) as hub:
        yield hub


@pytest.fixture(scope="module")
def key(hub: RunningHub) -> str:
    return hub.keys.add_key(PROJECT, scopes=SCOPES)[1]


@pytest.fixture(scope="module")
def client(hub: RunningHub, key: str) -> Iterator[Fabric]:
    with Fabric(hub.base_url, key, timeout_s=60) as client:
        yield client


def test_a_trace_comes_back_with_its_arrays_and_its_charge(client: Fabric) -> None:
    with fabric.trace(MODEL, "one two three", backend=client, max_tokens=2) as t:
        h = t.layers[0].out.save()
        t.layers[1].out[-1] += np.ones(8)
        top = t.logits[-1].topk(4).save()
    assert h.shape == (4, 8)
    assert h.positions is None or len(h.positions) == 4
    assert top.value.indices.shape == top.value.values.shape == (4,)
    assert t.site == "alpha"
    assert t.charge_usu > 0
    assert t.usage.hook_bytes_in > 0
    assert t.usage.hook_bytes_out > h.value.nbytes
    assert t.digest == client.points(MODEL).digest
    assert len(t.tokens) == 2
    assert "alpha" in t._repr_html_()


def test_a_quote_is_an_upper_bound_and_charges_nothing(hub: RunningHub, client: Fabric) -> None:
    with fabric.trace(MODEL, "one two", backend=client) as t:
        t.layers[0].out += 1.0
        t.logits[-1].save()
        before = client.usage().allocations
        quote = t.quote()
        assert client.usage().allocations == before
    assert quote.charge_usu_max >= t.charge_usu > 0
    assert set(quote.scopes) == {"program:read", "program:write"}
    assert quote.result_bytes >= t.usage.hook_bytes_out


def test_what_is_streamed_arrives_by_steps_and_whole(client: Fabric) -> None:
    events: list[ProgramEvent] = []
    with fabric.trace(MODEL, "one two", backend=client, max_tokens=3, on_event=events.append) as t:
        each = t.layers[1].out.save("each", stream=True)
        rest = t.layers[0].out.save("rest")
    steps = [event for event in events if isinstance(event, StepSaves)]
    assert [event.step for event in steps] == [0, 1, 2]
    assert all(event.arrays["each"].shape[-1] == 8 for event in steps)
    tokens = [event.token_id for event in events if isinstance(event, RunToken)]
    assert tuple(tokens) == t.tokens
    assert len(tokens) == 3
    assert rest.shape == (4, 8)
    assert sum(event.arrays["each"].size for event in steps) == each.value.size


def test_constants_too_large_for_a_request_are_stored_first(client: Fabric) -> None:
    large = np.ones((200_000, 8), dtype=np.float32)
    with fabric.trace(MODEL, "one", backend=client) as t:
        found = (t.layers[0].out @ large.T).sum(-1).save()
    assert found.shape == (1,)
    assert t.usage.hook_bytes_in > large.nbytes


def test_results_too_large_for_a_reply_are_fetched(hub: RunningHub, client: Fabric) -> None:
    with fabric.trace(MODEL, list(range(400)), backend=client) as t:
        logits = t.logits.save()
    assert logits.shape == (400, 4096)
    assert logits.value.nbytes > 4 * 2**20


def test_an_artifact_can_be_fetched_and_deleted_and_is_then_gone(client: Fabric) -> None:
    kept = client._background.run(
        client._fabric._transport.put_bytes("/v1/fabric/artifacts", b"\2\0\0\0\0\0\0\0{}")
    )
    assert client.artifact(kept["id"]) == b"\2\0\0\0\0\0\0\0{}"
    client.delete_artifact(kept["id"])
    with pytest.raises(NotFound):
        client.artifact(kept["id"])


def test_refusals_of_the_hub_keep_their_type(hub: RunningHub, client: Fabric) -> None:
    with pytest.raises(UnknownModel), fabric.trace("nobody", "x", backend=client) as t:
        t.logits.save()
    reader = hub.keys.add_key(PROJECT, scopes=("query", "program:read"))[1]
    with Fabric(hub.base_url, reader) as weak:
        with fabric.trace(MODEL, "x", backend=weak) as t:
            t.logits.save()
        with fabric.trace(MODEL, "x", backend=weak, dry_run=True) as t:
            t.layers[0].out += 1.0
            t.logits.save()
        with pytest.raises(PermissionDenied, match="program:write"):
            weak.run_program(t.program, model=MODEL)


def test_limits_of_the_user_are_held_before_anything_runs(client: Fabric) -> None:
    small = ProgramLimits(result_bytes=100)
    with (
        pytest.raises((ProgramTooLarge, TraceError)),
        fabric.trace(MODEL, "one two", backend=client, limits=small) as t,
    ):
        t.logits.save()


def test_a_hub_that_is_not_there_is_told() -> None:
    with Fabric("http://127.0.0.1:9", "sk-none", num_retries=0) as nobody:
        t = fabric.trace(MODEL, "one", backend=nobody)
        with pytest.raises(HubUnreachable), t:
            t.logits.save()


def test_two_traces_at_once_keep_apart(client: Fabric) -> None:
    with (
        fabric.trace(MODEL, "one two", backend=client) as first,
        fabric.trace(MODEL, "one two three", backend=client) as second,
    ):
        a, b = first.logits.save(), second.logits.save()
    assert (a.shape[0], b.shape[0]) == (2, 3)


def test_an_error_in_the_block_runs_nothing(hub: RunningHub, client: Fabric) -> None:
    before = len(client.runs(limit=100))
    t = fabric.trace(MODEL, "one", backend=client)
    with pytest.raises(ZeroDivisionError), t:
        t.logits[1 // 0].save()
    assert len(client.runs(limit=100)) == before
    with pytest.raises(TraceError, match="no value yet"):
        _ = t.text


def test_the_tokens_of_a_prompt_are_told(client: Fabric) -> None:
    tokens = client.tokens("one two three", model=MODEL)
    assert len(tokens) == 3
    assert all(token.text for token in tokens)


class TestCommands:
    @pytest.fixture
    def run(self, hub: RunningHub, key: str, tmp_path: Path) -> object:
        def invoke(*argv: str) -> str:
            env = {"FABRIC_STATE_DIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
            options = ["--base-url", hub.base_url, "--api-key", key]
            done = CliRunner().invoke(command, [*argv, *options], env=env)
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
            return f"{done.exit_code}\n{done.stdout}{done.stderr}"

        return invoke

    @pytest.fixture
    def file(self, client: Fabric, tmp_path: Path) -> Path:
        with fabric.trace(MODEL, "one two", backend=client, dry_run=True) as t:
            t.layers[0].out.add(np.ones(8))
            t.logits[-1].save("logits")
        write_program(tmp_path / "program.json", t.program, MODEL)
        return tmp_path / "program.json"

    def test_points_are_grouped_and_say_why_not(self, run) -> None:
        told = run("points", MODEL)
        assert told.startswith("0\n")
        assert "layers.{i}.out" in told
        assert "this model has no attention" in told
        assert json.loads(run("points", MODEL, "--format", "json")[2:])["num_layers"] == 2

    def test_a_program_from_a_file_is_quoted_and_run(self, run, file: Path) -> None:
        target = file.with_name("out.safetensors")
        quoted = run("trace", "run", str(file), "--quote")
        assert "program:read, program:write" in quoted
        assert not target.exists()
        told = run("trace", "run", str(file), "--output", str(target))
        assert "[4096]" in told
        assert read_tensors(target.read_bytes())[0]["run0/logits"].shape == (4096,)

    @pytest.mark.parametrize(
        ("content", "said"),
        [("{", "no JSON"), ("[]", "not valid"), ('{"v": 1, "runs": []}', "runs"), ("", "no JSON")],
    )
    def test_what_is_no_program_is_refused(
        self, run, tmp_path: Path, content: str, said: str
    ) -> None:
        (tmp_path / "bad.json").write_text(content)
        told = run("trace", "run", str(tmp_path / "bad.json"), "--model", MODEL)
        assert told.startswith("3\n")
        assert said in told
        assert run("trace", "run", str(tmp_path / "nothing.json")).startswith("3\n")

    def test_a_lens_is_shown_in_pages_that_fit(self, run, tmp_path: Path) -> None:
        told = run("lens", MODEL, "one two three four five six seven eight nine ten")
        assert told.startswith("0\n")
        assert "layer 1" in told
        assert all(len(line) <= 80 for line in told.splitlines() if " · " not in line)
        page = tmp_path / "lens.html"
        assert run("lens", MODEL, "one two", "--output", str(page)).startswith("0\n")
        assert "layer 1" in page.read_text()
        assert run("lens", MODEL, "one", "--output", "lens.pdf").startswith("2\n")
        told = run("lens", MODEL, "one two", "--format", "json")[2:]
        found, _ = json.JSONDecoder().raw_decode(told)
        assert found["rows"] == ["layer 0", "layer 1"]
        assert np.shape(found["ids"]) == (2, 2)

    def test_heads_of_a_model_without_them_are_refused(self, run) -> None:
        assert run("lens", MODEL, "one", "--heads").startswith("3\n")


def test_every_refusal_is_one_of_the_taxonomy() -> None:
    for kind in (PointRefused, ProgramInvalid, ProgramTooLarge, TraceError):
        assert issubclass(kind, FabricError)
