"""Programs from HTTP through a hub to the engine and back, on a small real model."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import Program
from fabric.messages.program import MAX_INLINE_BYTES
from fabric.testing.families import FAMILIES
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.programs import Interpreter

pytestmark = pytest.mark.timeout(180)

SCOPES = ("query", "program:read", "program:write", "program:gradient", "program:weights")
HIDDEN = 48
IDS = [5, 17, 101, 9, 44, 250]
SAVE: dict[str, Any] = {"op": "save", "name": "h", "x": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES["llama"]().eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Iterator[RunningHub]:
    directory = tmp_path_factory.mktemp("programs")
    files = tmp_path_factory.mktemp("model")
    model.save_pretrained(files)
    write_tokenizer(files)
    hubs: list[RunningHub] = []

    def get_engine() -> TorchEngine:
        config = EngineConfig(dtype="float32", num_threads=1, cache_bytes=2**24)
        return TorchEngine(
            ModelSource.parse(str(files)),
            config,
            name=MODEL,
            keep=lambda data: hubs[0].sites["alpha"].depot.keep(data),
        )

    with running_hub(directory, sites=["alpha"], engine=get_engine) as hub:  # type: ignore[list-item]
        hubs.append(hub)
        hub.ledger.set_rate(
            MODEL,
            "*",
            prompt_usu=1,
            cached_prompt_usu=1,
            output_usu=2,
            hook_in_usu=1,
            hook_out_usu=3,
            device_usu=1000,
        )
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[httpx.Client]:
    _, key = hub.keys.add_key(PROJECT, scopes=SCOPES)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=60) as client:
        yield client


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)


def constants(**tensors: torch.Tensor) -> dict[str, Any]:
    data = save(tensors)
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "data": base64.b64encode(data).decode(),
    }


def post(client: httpx.Client, program: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "program": program, **fields}
    return client.post("/v1/fabric/programs", json=body)


def saved(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load(base64.b64decode(run["data"]))


def steering() -> dict[str, Any]:
    """A clean run saves, another takes from it, adds a direction, and generates."""
    torch.manual_seed(1)
    clean = [{"op": "read", "at": "layers.0.out"}, SAVE]
    steered = [
        {"op": "saved", "run": "clean", "save": "h", "positions": [2]},
        {"op": "write", "at": "layers.0.out", "x": 0, "sel": {"phase": "prefill", "pos": [3]}},
        {"op": "const", "name": "v"},
        {"op": "write", "at": "layers.1.out", "x": 2, "mode": "add", "alpha": 4.0},
        {"op": "read", "at": "logits", "sel": {"pos": "last"}},
        {"op": "save", "name": "logits", "x": 4},
    ]
    return {
        "runs": [
            {"id": "clean", "ids": IDS, "nodes": clean},
            {"id": "steered", "ids": IDS[::-1], "nodes": steered, "gen": {"max_tokens": 4}},
        ],
        "consts": constants(v=torch.randn(HIDDEN)),
    }


def test_a_program_through_the_hub_is_what_hooks_compute(
    hub: RunningHub, client: httpx.Client, model: PreTrainedModel
) -> None:
    program = steering()
    quote = post(client, program, quote=True).json()
    reply = post(client, program)
    assert reply.status_code == 200, reply.text
    result = reply.json()
    expected = Interpreter(model).run(Program.model_validate(program))
    for run in result["runs"]:
        assert run["tokens"] == expected[run["id"]].tokens
        for name, tensor in saved(run).items():
            torch.testing.assert_close(tensor, expected[run["id"]].saves[name], atol=1e-5, rtol=0)
    usage = result["usage"]
    charge = (
        usage["prompt_tokens"]
        + 2 * usage["completion_tokens"]
        + usage["hook_bytes_in"]
        + 3 * usage["hook_bytes_out"]
    )
    device_usu = result["fabric"]["charge_usu"] - charge
    assert 0 <= device_usu <= min(usage["device_s"], quote["device_s_max"]) * 1000 + 1
    assert result["fabric"]["charge_usu"] <= quote["charge_usu_max"]


def test_results_too_large_for_a_session_are_kept_for_the_project(client: httpx.Client) -> None:
    size = MAX_INLINE_BYTES // 4 + 1
    nodes = [{"op": "zeros", "shape": [size], "fill": 2.0}, SAVE]
    reply = post(client, {"runs": [{"id": "a", "ids": [1], "nodes": nodes}]})
    assert reply.status_code == 200, reply.text
    (run,) = reply.json()["runs"]
    contents = client.get(f"/v1/fabric/artifacts/{run['handle']['id']}").content
    assert torch.equal(load(contents)["h"], torch.full((size,), 2.0))

    taking = {"op": "artifact", "id": run["handle"]["id"], "run": "a", "save": "h"}
    summed = [taking, {"op": "mean", "x": 0}, {**SAVE, "x": 1}]
    reply = post(client, {"runs": [{"id": "b", "ids": [1], "nodes": summed}]})
    assert reply.status_code == 200, reply.text
    assert float(saved(reply.json()["runs"][0])["h"]) == 2.0
    assert reply.json()["usage"]["hook_bytes_in"] > MAX_INLINE_BYTES


def test_a_program_that_fails_ends_alone(hub: RunningHub, client: httpx.Client) -> None:
    nan = [
        {"op": "zeros", "shape": [HIDDEN]},
        {"op": "log", "x": 0},
        {"op": "sub", "x": 1, "y": 1},
        {"op": "write", "at": "layers.0.out", "x": 2, "mode": "add"},
    ]

    def fails(_: int) -> tuple[int, str]:
        reply = post(client, {"runs": [{"id": "a", "ids": IDS, "nodes": nan}]})
        return reply.status_code, reply.json()["error"]["code"]

    def answers(number: int) -> str:
        body = {"model": MODEL, "prompt": IDS, "max_tokens": 8, "temperature": 0}
        reply = client.post("/v1/completions", json=body)
        return str(reply.json()["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        failed, whole = pool.map(fails, range(4)), pool.map(answers, range(4))
        assert set(failed) == {(422, "program_failed")}
        assert len(set(whole)) == 1
    wait_until(lambda: all(one.held_usu == 0 for one in hub.ledger.allocations(PROJECT)))


DOOMED_HUB = """
import sys, time
from pathlib import Path
from fabric.broker import BrokerSettings
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import running_hub

settings = BrokerSettings(lease_s=1.0, sweep_s=0.1)
engine = lambda: FixedDelayEngine(token_s=0.05)
with running_hub(Path(sys.argv[1]), sites=["alpha"], engine=engine, broker=settings) as hub:
    _, key = hub.keys.add_key("physics", scopes=["query", "program:read"])
    print(hub.base_url, key, flush=True)
    time.sleep(600)
"""


def test_a_killed_hub_gives_the_hold_back_and_keeps_what_is_stored(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DOOMED_HUB, str(tmp_path)]
    data = save({"w": torch.ones(3)})
    nodes = [{"op": "read", "at": "logits"}, {**SAVE, "reduce": "last"}]
    run = {"id": "a", "ids": [1], "nodes": nodes, "gen": {"max_tokens": 2000}}
    body = {"model": MODEL, "program": {"runs": [run]}, "stream": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as doomed:
        assert doomed.stdout is not None
        base_url, key = doomed.stdout.readline().split()
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=base_url, headers=headers, timeout=30) as client:
            kept = client.put("/v1/fabric/artifacts", content=data).json()
            with client.stream("POST", "/v1/fabric/programs", json=body) as reply:
                pieces = reply.iter_text()
                assert json.loads(next(pieces).removeprefix("data: "))["token_id"] == 1000
                doomed.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(pieces)
    with running_hub(tmp_path, sites=[]) as hub:
        wait_until(lambda: hub.ledger.allocations(PROJECT)[0].held_usu == 0, timeout_s=20)
        assert hub.ledger.allocations(PROJECT)[0].available_usu == 10**12
        reply = httpx.get(f"{hub.base_url}/v1/fabric/artifacts/{kept['id']}", headers=headers)
        assert reply.content == data
