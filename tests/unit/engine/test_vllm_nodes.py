"""What vLLM is told where a model is divided over several nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.engine.config import EngineConfig
from fabric.engine.vllm.command import get_command, get_node_command
from fabric.errors import SettingInvalid
from fabric.messages import EngineOptions, VllmOptions
from fabric.testing.tiny_model import save_tiny_llama, save_tiny_sentences

DIVIDED = {"tensor_parallel": 4, "pipeline_parallel": 2}
SEVERAL = {"rendezvous": "x1:4321", "local_ranks": 4}
OPTIONS = VllmOptions(args=("--enforce-eager",))


def words_of(config: EngineConfig) -> list[str]:
    return get_command(OPTIONS, config, path=Path("/m"), name="m@1", port=80)


def test_one_process_is_told_of_no_division() -> None:
    words = words_of(EngineConfig())
    assert words[:2] == ["vllm", "serve"]
    assert words[-1] == "--enforce-eager"
    assert not [word for word in words if "parallel" in word or "node" in word]


def test_one_node_is_told_how_its_devices_divide_the_model() -> None:
    words = words_of(EngineConfig(**DIVIDED))
    assert {"--tensor-parallel-size=4", "--pipeline-parallel-size=2"} <= {*words}
    assert not [word for word in words if "node" in word]


def test_a_server_embeds_where_the_model_or_the_site_says_so(tmp_path: Path) -> None:
    def words(options: VllmOptions, path: Path) -> str:
        return " ".join(get_command(options, EngineConfig(), path=path, name="m@1", port=80))

    plain, sentences = tmp_path / "plain", tmp_path / "sentences"
    save_tiny_sentences(sentences)
    assert "--runner" not in words(VllmOptions(), plain)
    told = words(VllmOptions(runner="pooling"), plain)
    assert "--runner=pooling" in told
    assert '--pooler-config={"pooling_type": "MEAN"}' in told
    found = words(VllmOptions(), sentences)
    assert "--runner=pooling" in found
    assert "--pooler-config" not in found
    assert "--max-num-batched-tokens" not in found


def test_the_first_node_answers_and_the_others_follow_it() -> None:
    config = EngineConfig(**DIVIDED, **SEVERAL)
    first = {*words_of(config)}
    other = {*get_node_command(OPTIONS, config, path=Path("/m"), name="m@1", node_rank=1)}
    shared = {"--nnodes=2", "--master-addr=x1", "--master-port=4321", "--tensor-parallel-size=4"}
    assert shared <= first & other
    assert first - other == {"--node-rank=0", "--host=127.0.0.1", "--port=80"}
    assert other - first == {"--node-rank=1", "--headless"}


def test_nodes_with_unequal_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(SettingInvalid, match="as many of the 8 ranks on every node"):
        words_of(EngineConfig(**DIVIDED, rendezvous="x1:1", local_ranks=3))


def test_a_further_node_becomes_the_command_that_is_configured(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny")
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    options = EngineOptions.model_validate(
        DIVIDED | SEVERAL | {"backend": "vllm", "vllm": {"command": [sys.executable, "-c", code]}}
    )
    command = [
        *(sys.executable, "-m", "fabric.engine.vllm.node", "--node-rank", "1", "--name", "m@1"),
        *("--source", str(model), "--options", options.model_dump_json(exclude_defaults=True)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    words = json.loads(done.stdout)
    assert f"--model={model}" in words
    assert words[-2:] == ["--node-rank=1", "--headless"]

    nowhere = [str(tmp_path) if word == str(model) else word for word in command]
    failed = subprocess.run(
        nowhere, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
    )
    assert failed.returncode == 1
    assert "vLLM cannot be started here" in failed.stderr
