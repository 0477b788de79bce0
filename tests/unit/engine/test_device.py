"""Where a model goes, and what of a GPU can be known without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric.engine.config import CACHE_BYTES, EngineConfig
from fabric.engine.device import (
    CPU,
    choose_cache_bytes,
    choose_device,
    choose_gpu,
    get_spare_bytes,
    uses_flex,
)
from fabric.engine.embedding import EmbeddingEngine
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.errors import SettingInvalid
from fabric.messages import EngineOptions
from fabric.testing.families import FAMILIES

GIB = 2**30


@pytest.fixture(params=[False, True], ids=["no gpu", "gpu"])
def sees_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch says that it sees a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return bool(request.param)


def test_a_model_goes_where_it_is_asked_to_or_where_torch_sees_a_gpu(sees_gpu: bool) -> None:
    gpu = torch.device("cuda", 0)
    assert choose_device(EngineConfig(device="cpu")) == CPU
    assert choose_device(EngineConfig()) == (gpu if sees_gpu else CPU)
    if sees_gpu:
        assert choose_device(EngineConfig(device="cuda", attention="flex")) == gpu
    for spread in ({"tensor_parallel": 2}, {"offload": "host"}):
        assert choose_device(EngineConfig(**spread)) == (gpu if sees_gpu else CPU)


def test_each_rank_of_a_node_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_gpu(index, 2) for index in range(2)] == [
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    with pytest.raises(SettingInvalid, match=r"3 ranks .* 2 GPUs.*ask the scheduler for more"):
        choose_gpu(2, 3)


def test_flex_attention_is_for_gpus_unless_it_is_told_off() -> None:
    gpu = torch.device("cuda", 0)
    assert uses_flex(EngineConfig(), gpu)
    assert not uses_flex(EngineConfig(attention="gathered"), gpu)
    assert not uses_flex(EngineConfig(), CPU)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"device": "cuda", "batch_invariant": True}, "depends on the batch"),
        ({"device": "cpu", "attention": "flex"}, "leave it out on a CPU"),
    ],
)
def test_what_is_for_another_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SettingInvalid, match=reason):
        choose_device(EngineConfig(**asked))


@pytest.mark.parametrize("kind", [TorchEngine, EmbeddingEngine])
def test_a_gpu_that_is_not_there_is_an_error_with_a_remedy(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TorchEngine]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = EngineOptions(device="cuda", num_threads=1)
    engine = kind(ModelSource.parse(str(tiny_dir)), EngineConfig.of(options), name="tiny")
    with pytest.raises(SettingInvalid, match=r"engine.device.*sees no GPU; ask.*set device: cpu"):
        engine.start()


@pytest.mark.parametrize("asked", [{"device": "tpu"}, {"attention": "paged"}, {"cache_bytes": 0}])
def test_settings_that_mean_nothing_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(SettingInvalid):
        EngineConfig(**asked)


def test_a_cache_is_as_large_as_is_said_or_usual() -> None:
    def run() -> None:
        pytest.fail("a CPU's memory is not measured")

    assert choose_cache_bytes(EngineConfig(cache_bytes=7), CPU, run) == 7
    assert choose_cache_bytes(EngineConfig(), CPU, run) == CACHE_BYTES


def test_a_gpus_cache_leaves_room_for_the_largest_step_and_some_more() -> None:
    spare = get_spare_bytes(free=60 * GIB, total=80 * GIB, working=5 * GIB)
    assert 48 * GIB < spare < 49 * GIB
    assert get_spare_bytes(free=GIB, total=80 * GIB, working=5 * GIB) == 0


@pytest.mark.slow
def test_no_step_mixes_devices_or_reads_what_a_graph_cannot_give() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "fabric.testing.pretend_gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    failed = told.pop("what must fail")
    assert "same device" in failed["mix"]
    assert "DataDependent" in failed["read"]
    assert set(told) == set(FAMILIES)
    for family, steps in told.items():
        assert len(steps) == 6
        for name, result in steps.items():
            assert result.startswith("gpu ["), (family, name, result)
