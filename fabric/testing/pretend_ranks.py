"""``python -m fabric.testing.pretend_ranks``: each rank of divided models on a GPU without values.

One rank after the other runs alone: what it exchanges is written down and goes nowhere. What is
printed is JSON: by family, layout and rank, what came of its steps, and its exchanges in their
order, each with the tensor's device, dtype and shape. The kernels and NCCL are for real GPUs to
show.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fabric.engine.flex import FlexAttention
from fabric.engine.partition import groups as exchanges
from fabric.engine.partition.groups import Groups, World
from fabric.engine.partition.layout import Layout
from fabric.engine.partition.loading import move_part
from fabric.engine.partition.runner import PartRunner
from fabric.engine.partition.stages import keep_stage
from fabric.engine.partition.torch_partitioner import TorchPartitioner
from fabric.engine.probe import observe_layers, run_largest
from fabric.testing.families import FAMILIES
from fabric.testing.pretend_gpu import GPU, NUM_BLOCKS, ROWS, attempt, pretending

DIVIDED = ("llama", "gpt2", "mixtral")
LAYOUTS = {"tensor": (2, 1), "pipeline": (1, 2), "both": (2, 2)}
"""Ranks of a tensor group, and stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What one rank did: ``sum`` in a group, ``send`` to or ``recv`` from another rank."""

    kind: str
    ranks: Sequence[int]
    what: str


class Notebook:
    """Stands where ``torch.distributed`` does, and writes down what it is asked for."""

    def __init__(self) -> None:
        self.noted: list[Exchange] = []

    def all_reduce(self, x: Tensor, group: range) -> None:
        """Note a sum."""
        self._note("sum", list(group), x)

    def send(self, x: Tensor, target: int, group: range) -> None:
        """Note what goes to another rank."""
        assert target in group
        self._note("send", [target], x)

    def recv(self, x: Tensor, source: int, group: range) -> None:
        """Note what comes from another rank."""
        assert source in group
        self._note("recv", [source], x)

    def _note(self, kind: str, ranks: list[int], x: Tensor) -> None:
        assert x.is_contiguous(), "NCCL takes nothing else"
        what = f"{x.device.type} {x.dtype} {list(x.shape)}"
        self.noted.append(Exchange(kind=kind, ranks=ranks, what=what))


def run_rank(family: str, layout: Layout, rank: int) -> dict[str, Any]:
    """Return what came of a rank's steps, and its exchanges."""
    notebook, place = Notebook(), layout.place(rank)
    world = cast("World", SimpleNamespace(of=lambda ranks: ranks, meeting_of=lambda ranks: ranks))
    with mock.patch.object(exchanges, "dist", notebook):
        with unset_fake_temporarily():
            model, groups = FAMILIES[family]().eval(), Groups(place, world)
            if layout.tensor > 1:
                TorchPartitioner().divide(model, groups, name=family)
            keep_stage(model, groups, name=family)
        _empty(model)
        move_part(model, torch.device(GPU))
        layers = observe_layers(model, name=family, expected=place.layers)
        runner = PartRunner(
            model,
            layers,
            num_blocks=NUM_BLOCKS,
            groups=groups,
            vocabulary=model.config.vocab_size,
            divided=layout.tensor > 1,
            attention=FlexAttention,
        )

        def largest() -> Tensor:
            run_largest(model, num_tokens=100, num_wanted=3)
            return runner.forward(ROWS[:1])

        steps = {
            "flex": lambda: runner.forward(ROWS),
            "hidden": lambda: runner.forward_hidden(ROWS)[1],
            "largest": largest,
        }
        told = {name: attempt(step) for name, step in steps.items()}
    return {"steps": told, "exchanges": [asdict(one) for one in notebook.noted]}


def _empty(model: nn.Module) -> None:
    """Take the tensors' values; they are on the CPU, as when files have been read."""
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None:
                empty = torch.empty(x.shape, dtype=torch.bfloat16)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


def main() -> None:
    """Run all ranks."""
    told: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with pretending():
        for family in DIVIDED:
            told[family] = {}
            for name, (tensor, pipeline) in LAYOUTS.items():
                layout = Layout.of(
                    2, tensor=tensor, pipeline=pipeline, stage_layers=None, name=family
                )
                ranks = range(layout.num_ranks)
                told[family][name] = [run_rank(family, layout, rank) for rank in ranks]
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
