"""Puts a plan together, or says what would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fabric.errors import PlanImpossible, RequestInvalid
from fabric.planning.bounds import Bounds, get_bounds
from fabric.planning.choice import (
    can_split,
    choose_split,
    does_fit,
    fewest_nodes,
    largest_batch,
)
from fabric.planning.devices import DEVICES, HERE, Device
from fabric.planning.memory import RankMemory
from fabric.planning.model_shape import ModelShape
from fabric.planning.split import Machine, Split, get_split, ranks_of
from fabric.planning.workload import Workload, check_count

DEFAULT_CONTEXT_TOKENS = 8192
DEFAULT_BATCH = 16
DEFAULT_STEP_TOKENS = 2048

_SMALLER_DTYPES = {"fp32": ("bf16", "int8", "int4"), "bf16": ("int8", "int4")} | {
    "fp16": ("int8", "int4"),
    "int8": ("int4",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model would run on some devices.

    Args:
        shape: The model.
        machine: The devices.
        work: What it is asked to do.
        split: How one copy is divided.
        ranks: What each rank of that copy holds.
        bounds: What that copy cannot exceed.
        num_copies: Copies that the devices have room for, side by side.
        reasons: Why the split is what it is.
        warnings: What the plan takes for granted, or wastes.
    """

    shape: ModelShape
    machine: Machine
    work: Workload
    split: Split
    ranks: tuple[RankMemory, ...]
    bounds: Bounds
    num_copies: int
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes that one copy reaches over."""
        return self.node_of(self.ranks[-1]) + 1

    @property
    def max_batch(self) -> int:
        """Rows of the planned context that one copy's memory could hold."""
        return largest_batch(self.shape, self.work, self.split, self.machine)

    @property
    def engine_options(self) -> dict[str, int | list[int]]:
        """What a site's file says under ``options`` to have the model divided so."""
        options: dict[str, int | list[int]] = {
            "tensor_parallel": self.split.tensor,
            "pipeline_parallel": self.split.pipeline,
            "cache_bytes": max(rank.cache_bytes for rank in self.ranks),
        }
        if self.split.pipeline > 1:
            options["stage_layers"] = [len(layers) for layers in self.split.stages]
        return options

    def node_of(self, rank: RankMemory) -> int:
        """Return the node on which a rank is."""
        return self.machine.node_of(rank.stage, self.split.tensor)


def get_plan(
    shape: ModelShape,
    device: Device,
    *,
    num_nodes: int = 1,
    devices_per_node: int | None = None,
    dtype: str = "bf16",
    context_tokens: int | None = None,
    batch: int = DEFAULT_BATCH,
    step_tokens: int = DEFAULT_STEP_TOKENS,
) -> Plan:
    """Return how a model would run.

    Args:
        shape: The model.
        device: What one rank runs on.
        num_nodes: Nodes there are.
        devices_per_node: Devices in each; ``None``: as many as such nodes mostly have.
        dtype: bf16, fp16, fp32, int8 or int4; the last two are of weights alone.
        context_tokens: The longest row; ``None``: 8192, or what the model was made for if that is
            less.
        batch: Rows of that length that run at once.
        step_tokens: The most prompt tokens in one step.

    Raises:
        RequestInvalid: A number is not a positive whole one, the dtype is not known, the context
            is longer than the model's, or more than one device is wanted of this machine.
        PlanImpossible: The model does not fit; says what would.
    """
    if context_tokens is None:
        context_tokens = min(DEFAULT_CONTEXT_TOKENS, shape.context_tokens)
    work = Workload(
        dtype=dtype, context_tokens=context_tokens, batch=batch, step_tokens=step_tokens
    )
    if context_tokens > shape.context_tokens:
        raise RequestInvalid(
            param="context_tokens",
            value=context_tokens,
            reason=f"{shape.name} was made for at most {shape.context_tokens}",
        )
    per_node = device.devices_per_node if devices_per_node is None else devices_per_node
    check_count("num_nodes", num_nodes)
    check_count("devices_per_node", per_node)
    if device.name == HERE and num_nodes * per_node > 1:
        raise RequestInvalid(
            param="device", value=HERE, reason="this machine is one node of one device"
        )
    machine = Machine(device=device, num_nodes=num_nodes, devices_per_node=per_node)
    split = choose_split(shape, work, machine)
    if split is None:
        raise _impossible(shape, work, machine)
    return Plan(
        shape=shape,
        machine=machine,
        work=work,
        split=split,
        ranks=ranks_of(shape, work, split, device.memory_bytes),
        bounds=get_bounds(shape, work, split, machine),
        num_copies=machine.num_copies(tensor=split.tensor, pipeline=split.pipeline),
        reasons=tuple(_reasons(shape, work, split, machine)),
        warnings=tuple(_warnings(shape, work, split, machine)),
    )


def _reasons(shape: ModelShape, work: Workload, split: Split, machine: Machine) -> Iterator[str]:
    device = machine.device.name
    num_copies = machine.num_copies(tensor=split.tensor, pipeline=split.pipeline)
    if split.num_ranks == 1:
        yield f"one {device} holds a whole copy"
        return
    copies = "one copy" if num_copies == 1 else f"{num_copies} copies"
    yield (
        f"there is room for {copies}; of the splits that leave it, {split.tensor} tensor x"
        f" {split.pipeline} pipeline ranks have the highest bound on a row's tokens/s"
    )
    degrees = shape.tensor_degrees(machine.devices_per_node)
    if split.tensor == degrees[-1] < machine.devices_per_node:
        yield (
            f"tensor groups have at most {split.tensor} ranks: heads and widths"
            f" ({', '.join(map(str, dict.fromkeys(shape.divisors)))}) divide no further"
        )
    alone = get_split(shape, work, tensor=degrees[-1], pipeline=1)
    if split.pipeline > 1 and not does_fit(shape, work, alone, machine):
        yield f"{split.pipeline} pipeline stages: no tensor group in a node can hold all layers"
    if split.experts == "whole":
        yield "experts whole on ranks (expert parallel): divided, they would be too thin"
    elif split.experts == "divided" and split.tensor > 1:
        yield "every expert divided among the group: all its ranks work at any batch"


def _warnings(shape: ModelShape, work: Workload, split: Split, machine: Machine) -> Iterator[str]:
    used = split.num_ranks * machine.num_copies(tensor=split.tensor, pipeline=split.pipeline)
    idle = machine.num_nodes * machine.devices_per_node - used
    if idle:
        yield f"{idle} of {used + idle} devices stay idle: no further copy fits on them"
    if split.pipeline > work.batch:
        yield f"{split.pipeline} stages and {work.batch} rows: most stages wait most of the time"
    if split.experts == "whole":
        yield "the engine divides every expert all the same; none is whole on a rank yet"
    if shape.expanded_cache_values:
        kept = shape.layers[0].cache_values
        yield (
            f"the cache is the latent one ({kept} numbers a token and layer, whole on every rank);"
            f" an engine that keeps keys and values needs {shape.expanded_cache_values}"
        )
    if machine.device.name == HERE:
        yield "speeds of this machine are estimates: other work slows what is measured"
    yield from shape.notes


def _impossible(shape: ModelShape, work: Workload, machine: Machine) -> PlanImpossible:
    device = machine.device
    wanted = f"{machine.num_nodes} x {machine.devices_per_node} {device.name}"
    ends = shape.embedding * (1 if shape.is_tied else 2)
    weights = work.precision.weight_bytes(matrices=shape.parameters - ends, values=ends)
    cache = sum(layer.cache_values for layer in shape.layers) * work.precision.value_bytes
    return PlanImpossible(
        model=shape.name,
        wanted=wanted,
        reason=f"its weights are about {gigabytes(weights)} in {work.dtype}, the cache of"
        f" {work.batch} rows of {work.context_tokens} tokens is"
        f" {gigabytes(cache * work.cache_tokens)}, and a device has"
        f" {gigabytes(device.memory_bytes)}",
        remedies=list(_remedies(shape, work, machine)),
    )


def _remedies(shape: ModelShape, work: Workload, machine: Machine) -> Iterator[str]:
    """Say what to change, one thing at a time."""
    if machine.device.name != HERE and (num_nodes := fewest_nodes(shape, work, machine)):
        yield f"--nodes {num_nodes}"
    for dtype in _SMALLER_DTYPES.get(work.dtype, ()):
        if can_split(shape, dataclasses.replace(work, dtype=dtype), machine):
            yield f"--dtype {dtype}"
            break
    if batch := _largest_batch(shape, work, machine):
        yield f"--batch {batch}"
    others = [
        other.name
        for other in DEVICES.values()
        if other.name != machine.device.name
        and can_split(
            shape,
            work,
            Machine(
                device=other,
                num_nodes=machine.num_nodes,
                devices_per_node=other.devices_per_node,
            ),
        )
    ]
    if others:
        nodes = "a node" if machine.num_nodes == 1 else f"{machine.num_nodes} nodes"
        yield f"{nodes} of {', '.join(others)}"


def _largest_batch(shape: ModelShape, work: Workload, machine: Machine) -> int:
    """Return the most rows that fit, 0 if not even one does; ``work`` has too many."""
    fits, too_many = 0, work.batch
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if can_split(shape, dataclasses.replace(work, batch=middle), machine):
            fits = middle
        else:
            too_many = middle
    return fits


def gigabytes(num_bytes: float) -> str:
    """Return a size as people write it: 10^9 bytes to the GB."""
    return f"{num_bytes / 1e9:,.3g} GB" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f} GB"
