"""How a model can be divided: tensor groups inside a node, pipeline stages over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fabric.planning.devices import Device
from fabric.planning.memory import RankMemory, cache_bytes, rank_memory
from fabric.planning.model_shape import ModelShape
from fabric.planning.workload import Workload

_NARROWEST_EXPERT = 256
"""An expert's inner width on one rank below which its matrices are too thin to multiply well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Devices that may be used.

    Args:
        device: Of which kind.
        num_nodes: Nodes.
        devices_per_node: Devices in each.
    """

    device: Device
    num_nodes: int
    devices_per_node: int

    def num_stages(self, tensor: int) -> int:
        """Return how many tensor groups there is room for; none reaches over two nodes."""
        return self.num_nodes * (self.devices_per_node // tensor)

    def num_copies(self, *, tensor: int, pipeline: int) -> int:
        """Return how many copies of a model there is room for."""
        return self.num_stages(tensor) // pipeline

    def node_of(self, stage: int, tensor: int) -> int:
        """Return the node on which a stage is."""
        return stage // (self.devices_per_node // tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a model is divided.

    Args:
        tensor: Ranks that divide every matrix of a stage.
        stages: The layers of each pipeline stage.
        experts: ``divided``: every rank has a part of every expert; ``whole``: each has some
            experts whole (expert parallel); ``none``: the model has no experts.
    """

    tensor: int
    stages: tuple[range, ...]
    experts: str

    @property
    def pipeline(self) -> int:
        """The number of pipeline stages."""
        return len(self.stages)

    @property
    def num_ranks(self) -> int:
        """Devices that one copy of the model takes."""
        return self.tensor * self.pipeline


def get_split(shape: ModelShape, work: Workload, *, tensor: int, pipeline: int) -> Split:
    """Return a split of a given form, whose stages are as even as layers allow."""
    costs = layer_bytes(shape, work, tensor)
    end = work.precision.weight_bytes(matrices=0, values=shape.embedding // tensor)
    costs[0] += end
    costs[-1] += end
    return Split(
        tensor=tensor, stages=divide_evenly(costs, pipeline), experts=_experts(shape, tensor)
    )


def ranks_of(
    shape: ModelShape, work: Workload, split: Split, device_bytes: int
) -> tuple[RankMemory, ...]:
    """Return what every rank of a split holds, stage by stage."""
    return tuple(
        rank_memory(
            shape,
            work,
            layers,
            tensor=split.tensor,
            tensor_rank=tensor_rank,
            stage=stage,
            device_bytes=device_bytes,
        )
        for stage, layers in enumerate(split.stages)
        for tensor_rank in range(split.tensor)
    )


def divide_evenly(costs: Sequence[int], parts: int) -> tuple[range, ...]:
    """Divide a row of costs into consecutive parts, the dearest of which is as cheap as can be.

    Args:
        costs: What each element costs.
        parts: How many parts; at most one for each element.
    """
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(costs, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    ranges = _fill(costs, low)
    while len(ranges) < parts:
        # Cutting a part in two makes none dearer.
        longest = max(range(len(ranges)), key=lambda index: len(ranges[index]))
        cut = ranges[longest]
        middle = (cut.start + cut.stop) // 2
        ranges[longest : longest + 1] = [range(cut.start, middle), range(middle, cut.stop)]
    return tuple(ranges)


def _fill(costs: Sequence[int], limit: int) -> list[range]:
    ranges, start, filled = [], 0, 0
    for index, cost in enumerate(costs):
        if filled + cost > limit and index > start:
            ranges.append(range(start, index))
            start, filled = index, 0
        filled += cost
    ranges.append(range(start, len(costs)))
    return ranges


def layer_bytes(shape: ModelShape, work: Workload, tensor: int) -> list[int]:
    """Return what every layer's weights and cache take on one rank."""
    return [
        work.precision.weight_bytes(
            matrices=(layer.divided + layer.experts) // tensor + layer.whole, values=layer.small
        )
        + cache_bytes(layer, work, tensor) * work.cache_tokens
        for layer in shape.layers
    ]


def _experts(shape: ModelShape, tensor: int) -> str:
    if not shape.num_experts:
        return "none"
    even = shape.expert_width % tensor == 0
    if tensor == 1 or (even and shape.expert_width // tensor >= _NARROWEST_EXPERT):
        return "divided"
    return "whole" if all(layer.num_experts % tensor == 0 for layer in shape.layers) else "divided"
