"""Decoding from fixed buffers: all but the capture itself, which needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from fabric.engine import opening
from fabric.engine.attention import Chunk
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.flex import FlexAttention
from fabric.engine.graphs import Replay
from fabric.engine.lowrank import Factors, LayerSize
from fabric.engine.probe import observe_layers, observe_linears, verify_graphs
from fabric.engine.runner import Runner
from fabric.errors import ModelNotLoadable
from fabric.testing.families import FAMILIES

MAX_ROWS = 5
NUM_BLOCKS = 24


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch compute all scores at once, without a compiler."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


class Counted:
    """Captures nothing, and counts the steps that are run by their rows."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, step: Replay) -> Replay:
        def replay() -> torch.Tensor:
            logits = step()
            self.sizes.append(len(logits))
            return logits

        return replay


@pytest.fixture
def runners(tiny_llama: Callable[..., Any]) -> tuple[Runner, Runner, Counted]:
    """Return a runner by modules and one from buffers, over the same model."""
    model = tiny_llama().eval().requires_grad_(False)
    layers = observe_layers(model, name="tiny")
    linears = observe_linears(model)
    plain, graphed = (
        Runner(
            model,
            layers,
            num_blocks=NUM_BLOCKS,
            linears=linears,
            attention=FlexAttention,
            scratch=True,
        )
        for _ in range(2)
    )
    counted = Counted()
    graphed.graph_decoding(max_rows=MAX_ROWS, num_blocks=8, capture=counted)
    return plain, graphed, counted


def decode(runner: Runner, prompts: list[list[int]], num: int) -> list[list[int]]:
    """Return what rows say greedily, each over blocks of its own."""
    blocks = [(1 + 4 * row, 4 + 4 * row, 2 + 4 * row, 3 + 4 * row) for row in range(len(prompts))]
    said = [list(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        chunk = Chunk(tokens=prompt, start=0, blocks=blocks[row], num_wanted=1)
        said[row].append(int(runner.forward([chunk]).argmax()))
    for _ in range(num):
        chunks = [
            Chunk(tokens=row[-1:], start=len(row) - 1, blocks=own, num_wanted=1)
            for row, own in zip(said, blocks, strict=True)
        ]
        for row, token in zip(said, runner.forward(chunks).argmax(-1).tolist(), strict=True):
            row.append(token)
    return said


@pytest.mark.parametrize(("num_rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 5)])
def test_rows_say_the_same_from_buffers(runners, num_rows, bucket) -> None:
    plain, graphed, counted = runners
    prompts = [[3 + row] * (5 + 14 * row % 31) for row in range(num_rows)]
    assert decode(graphed, prompts, 12) == decode(plain, prompts, 12)
    assert counted.sizes == [bucket] * 12


def test_a_bucket_forgets_the_rows_that_it_had(runners) -> None:
    plain, graphed, _ = runners
    decode(graphed, [[7] * 40, [8] * 20, [9] * 30], 12)
    prompts = [[5], [6] * 17, [2] * 3]
    assert decode(graphed, prompts, 12) == decode(plain, prompts, 12)


def test_places_left_over_write_to_the_scratch_block_alone(runners) -> None:
    _, graphed, _ = runners
    for pool in graphed.cache.layer(0):
        pool.fill_(0.5)
    graphed.forward(
        [Chunk(tokens=[3], start=0, blocks=(1 + row,), num_wanted=1) for row in range(3)]
    )
    for pool in graphed.cache.layer(0):
        written = (pool != 0.5).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert written == [BLOCK_TOKENS * block for block in (1, 2, 3, NUM_BLOCKS + 1)]


def test_other_steps_run_by_the_modules(runners) -> None:
    _, graphed, counted = runners

    def chunk(num: int = 1, wanted: int = 1, **more: Any) -> Chunk:
        return Chunk(tokens=[5] * num, start=0, blocks=(1,), num_wanted=wanted, **more)

    name, size = next(iter(graphed.lowrank.sizes.items()))
    assert isinstance(size, LayerSize)
    factors = Factors(down_RK=torch.ones(1, size.num_inputs), up_OR=torch.ones(size.num_outputs, 1))
    delta = graphed.lowrank.place({name: factors})
    others = [chunk(2), chunk(wanted=0), chunk(deltas=(delta,))]
    for other in others:
        graphed.forward([other])
    graphed.forward([chunk()] * (MAX_ROWS + 1))
    graphed.forward_hidden([chunk()])
    assert counted.sizes == []
    graphed.forward([chunk()])
    assert counted.sizes == [1]


def test_a_step_whose_logits_are_others_is_refused(runners) -> None:
    _, graphed, _ = runners
    verify_graphs(graphed, name="tiny")
    graphed.graph_decoding(
        max_rows=MAX_ROWS, num_blocks=8, capture=lambda step: lambda: step() + 1.0
    )
    with pytest.raises(ModelNotLoadable, match="set graphs: false"):
        verify_graphs(graphed, name="tiny")


FAMILIES_TRIED = ["llama", "gpt2", "gemma2, capped scores and windows", "gemma3, windows"]


@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_an_engine_says_what_generate_says(
    family: str, save_model: Any, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()

    class Graphed(Runner):
        def __init__(self, *args: Any, num_blocks: int, **more: Any) -> None:
            more |= {"attention": FlexAttention, "scratch": True}
            super().__init__(*args, num_blocks=num_blocks, **more)
            self.graph_decoding(max_rows=4, num_blocks=16, capture=counted)

    monkeypatch.setattr(opening, "Runner", Graphed)
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    driver = drive(save_model(model), cache_bytes=2**20, max_rows=4, step_tokens=40)
    prompts = [[3], [(5 * i) % 250 for i in range(70)], [7, 8, 9] * 9]
    heard = [driver.greedy(ids, 12, ignore_eos=True) for ids in prompts]
    for ids, one in zip(prompts, heard, strict=True):
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
        )
        assert one.wait().ids() == out[0, len(ids) :].tolist()
    assert 4 in counted.sizes
