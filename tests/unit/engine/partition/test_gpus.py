"""What of a model divided among GPUs can be known without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fabric.engine import torch_engine
from fabric.engine.config import EngineConfig
from fabric.engine.partition import crew as crews
from fabric.engine.partition.agent import Station, parse_arguments
from fabric.engine.partition.checkpoint import Cut
from fabric.engine.partition.crew import Crew
from fabric.engine.partition.follower import _is_exchange
from fabric.engine.partition.groups import World
from fabric.engine.partition.loading import move_part
from fabric.engine.partition.opening import Opening
from fabric.engine.partition.streaming import HostMemory
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.errors import RankLost
from fabric.testing.pretend_ranks import DIVIDED, LAYOUTS

STATION = Station(
    host="127.0.0.1", port=1, num_ranks=4, rank=1, local_ranks=3, num_threads=1, timeout_s=60.0,
    watches_stdin=True, first_gpu=1,
)  # fmt: skip


def test_ranks_take_the_gpus_behind_rank_0s_and_elsewhere_the_first() -> None:
    beside = [parse_arguments(STATION.arguments(str(local))) for local in range(3)]
    assert [(one.rank, one.gpu, one.node_ranks) for one in beside] == [
        (1, 1, 4),
        (2, 2, 4),
        (3, 3, 4),
    ]
    words = "--rendezvous head:1 --num-ranks 4 --first-rank 2 --local-ranks 2 --local-rank 1"
    elsewhere = parse_arguments(words.split())
    assert (elsewhere.rank, elsewhere.gpu, elsewhere.node_ranks) == (3, 1, 2)


@pytest.mark.timeout(300)
def test_a_node_with_too_few_gpus_is_refused_with_both_numbers_and_a_remedy() -> None:
    code = """
from fabric.engine.partition.crew import Crew
from fabric.errors import SettingInvalid
import torch
try:
    Crew(num_ranks=2, num_threads=1, device=torch.device("cuda", 0)).start()
except SettingInvalid as error:
    print(error.message)
"""
    # In a process of its own: this one may be rank 0 of another model.
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert "'engine.device' has the value 'cuda'" in done.stdout
    assert "2 ranks of the model shows them 0 GPUs" in done.stdout
    assert "set device: cpu" in done.stdout


def test_all_ranks_are_told_the_options_with_device_and_layers_chosen(tiny_dir) -> None:
    config = EngineConfig(pipeline_parallel=2, attention="gathered", dtype="float32")
    opening = Opening.of(ModelSource.parse(str(tiny_dir)), config, name="tiny")
    assert opening.config == replace(config, device="cpu", stage_layers=(1, 1))
    assert Opening.from_json(opening.to_json()) == opening
    assert opening.layout.num_ranks == 2


@pytest.mark.parametrize(
    ("error", "is_exchange"),
    [
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("NCCL Error 6: remote process exited or there was a network error"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (RuntimeError("CUDA out of memory."), False),
    ],
)
def test_errors_of_exchanges_are_told_from_those_of_computations(error, is_exchange) -> None:
    assert _is_exchange(error) == is_exchange


class World0(World):
    """A world of one, in which exchanges between GPUs have failed."""

    problem = ""

    def find_problem(self) -> str:
        return self.problem

    def settle(self) -> None:
        if self.problem:
            raise dist.DistBackendError(self.problem)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> tuple[Crew, World0]:
    """Rank 0, which has heard nothing of a loss."""
    monkeypatch.setattr(crews, "_EXPLAIN_S", 0.1)
    crew = Crew(num_ranks=2)
    crew._world = world = World0(dist.HashStore(), rank=0, num_ranks=2, timeout_s=1.0, local=True)
    return crew, world


def test_a_step_whose_exchange_failed_gives_no_result(alone) -> None:
    crew, world = alone
    world.problem = "an exchange between GPUs has taken over 600 s"
    with pytest.raises(RankLost, match="over 600 s"), crew.together():
        pass
    with pytest.raises(RankLost), crew.together():
        pytest.fail("there is no step after a loss")


def test_a_step_during_which_a_rank_is_lost_gives_no_result(alone) -> None:
    crew, _ = alone
    told: list[RankLost] = []
    crew.on_lost = told.append
    with pytest.raises(RankLost, match="Rank 1"), crew.together():
        crew._lose(1, "it was ended by SIGKILL")
    assert told


def test_a_rank_lost_while_the_engine_waits_for_ever_ends_start_and_close(
    tiny_dir, monkeypatch
) -> None:
    monkeypatch.setattr(torch_engine, "_WAKE_S", 0.1)
    engine = TorchEngine(ModelSource.parse(str(tiny_dir)), EngineConfig(), name="tiny")
    lost = RankLost(rank=1, num_ranks=2, reason="it was ended by SIGKILL")
    waits, wakes = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        wakes.wait(60)

    def lose() -> None:
        assert waits.wait(60)
        engine._lose(lost)

    monkeypatch.setattr(engine, "_build", wait)
    threading.Thread(target=lose).start()
    try:
        with pytest.raises(RankLost, match="SIGKILL"):
            engine.start()
        engine.close()
    finally:
        wakes.set()


def test_requests_fail_after_a_loss_though_the_engines_thread_never_wakes(
    drive, monkeypatch
) -> None:
    monkeypatch.setattr(torch_engine, "_WAKE_S", 0.1)
    driver = drive()
    steps, wakes = threading.Event(), threading.Event()

    def step() -> None:
        steps.set()
        wakes.wait(60)

    monkeypatch.setattr(driver.engine._batch, "step", step)
    heard = driver.greedy([5, 6, 7])
    try:
        assert steps.wait(60)
        driver.engine._lose(RankLost(rank=1, num_ranks=2, reason="it was ended by SIGKILL"))
        assert heard.failed.failure.code == "engine_stopped"
        assert "Rank 1" in heard.failed.failure.message
    finally:
        wakes.set()


def test_a_moved_part_keeps_tied_tensors_one_and_absent_ones_absent(tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj.to("meta")
    target = torch.device("meta")  # the one other device that every machine has
    before = model.model.layers[0].mlp.up_proj.weight
    move_part(model, target)
    assert {x.device for x in (*model.parameters(), *model.buffers())} == {target}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight is before


class CountingFiles:
    """Matrices of ones, and how often they were read."""

    num_reads = 0

    def read(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        self.num_reads += 1
        return torch.ones(2, cut.size if cut else 4)


def test_what_is_in_host_memory_is_read_once_for_each_part(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # which takes a GPU's driver
    files = CountingFiles()
    memory = HostMemory(files)
    left = Cut(dim=1, ranges=(range(3),))
    assert [memory.read("w", cut).shape[1] for cut in (None, left, None, left)] == [4, 3, 4, 3]
    assert files.num_reads == 2


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What each rank of each model did, on GPUs without values."""
    command = [sys.executable, "-W", "ignore", "-m", "fabric.testing.pretend_ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", DIVIDED)
def test_ranks_stay_on_their_gpus_and_exchange_what_the_others_expect(told, family, layout) -> None:
    ranks = told[family][layout]
    assert len(ranks) == LAYOUTS[layout][0] * LAYOUTS[layout][1]
    passed: dict[tuple[int, int], list[str]] = defaultdict(list)
    taken: dict[tuple[int, int], list[str]] = defaultdict(list)
    sums: dict[tuple[int, ...], list[list[str]]] = defaultdict(list)
    for rank, one in enumerate(ranks):
        for step, result in one["steps"].items():
            assert result.startswith("gpu ["), (rank, step, result)
        assert one["exchanges"]
        own: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for exchange in one["exchanges"]:
            assert exchange["what"].startswith("gpu "), exchange
            match exchange["kind"]:
                case "send":
                    passed[rank, exchange["ranks"][0]].append(exchange["what"])
                case "recv":
                    taken[exchange["ranks"][0], rank].append(exchange["what"])
                case "sum":
                    own[tuple(exchange["ranks"])].append(exchange["what"])
        for group, summed in own.items():
            assert rank in group
            sums[group].append(summed)
    assert passed == taken
    for group, summed_by in sums.items():
        assert len(summed_by) == len(group)
        assert all(one == summed_by[0] for one in summed_by)
    assert ranks[0]["steps"]["flex"] == "gpu [3, 259]"
