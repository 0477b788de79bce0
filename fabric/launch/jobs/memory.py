"""Whether a model fits the nodes of a machine, and how it is split over their devices."""

from __future__ import annotations

from dataclasses import dataclass

from fabric.config.system import NodeKind
from fabric.errors import LaunchImpossible, PlanError
from fabric.launch.jobs.order import Order
from fabric.planning import DEFAULT_CONTEXT_TOKENS, DEVICES, Device, Plan, get_plan
from fabric.planning.model_shape import ModelShape
from fabric.planning.plan import gigabytes

NODE_RESERVE = 0.1
"""The part of a node's memory that is left to everything else on it."""

DEFAULT_CACHE_BYTES = 512 * 2**20
"""What ``EngineConfig`` takes for the KV cache when nobody says otherwise."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model fits: in words, with the split over devices where there are any.

    ``weight_bytes`` is what must be read; ``None`` where nobody knows the model's shape.
    """

    text: str
    weight_bytes: int | None = None
    plan: Plan | None = None


def get_fit(order: Order, shape: ModelShape | None, kind: NodeKind | None) -> Fit:
    """Hold a model against the memory of an order's nodes.

    Raises:
        LaunchImpossible: It does not fit; says what would.
    """
    if shape is None:
        return Fit(text="not checked: nobody has told the shape of this model")
    if kind is None:
        return Fit(text="not checked: the site file does not say what the queue's nodes are")
    if kind.devices:
        return _fit_devices(order, shape, kind)
    return _fit_node(order, shape, kind)


def _fit_devices(order: Order, shape: ModelShape, kind: NodeKind) -> Fit:
    device = _find(kind)
    if device is None:
        return Fit(
            text=f"not checked: the memory of {kind.device or 'its devices'} is not known",
            weight_bytes=_weight_bytes(order, shape),
        )
    per_node = (kind.devices or 0) * kind.device_parts
    try:
        plan = get_plan(
            shape,
            device,
            num_nodes=order.nodes,
            devices_per_node=per_node,
            batch=order.options.max_rows,
            context_tokens=min(DEFAULT_CONTEXT_TOKENS, shape.context_tokens),
        )
    except PlanError as error:
        raise LaunchImpossible(
            param="nodes", value=order.nodes, reason=error.message.rstrip(".")
        ) from error
    rank = max(one.total_bytes for one in plan.ranks)
    text = (
        f"{plan.split.tensor} tensor x {plan.split.pipeline} pipeline ranks,"
        f" {gigabytes(rank)} of {gigabytes(device.memory_bytes)} on each {device.name}"
    )
    weights = sum(one.weight_bytes for one in plan.ranks)
    return Fit(text=text, weight_bytes=weights, plan=plan)


def _fit_node(order: Order, shape: ModelShape, kind: NodeKind) -> Fit:
    weights = _weight_bytes(order, shape)
    options, nodes = order.options, order.nodes
    num_ranks = max(nodes, options.tensor_parallel * options.pipeline_parallel)
    cache = -(-num_ranks // nodes) * (options.cache_bytes or DEFAULT_CACHE_BYTES)
    # Reading and packing weights holds them twice for a moment.
    needed = 2 * weights // nodes + cache
    if kind.memory_gb is None:
        return Fit(text="not checked: the nodes' memory is not known", weight_bytes=weights)
    room = int(kind.memory_gb * 1e9 * (1 - NODE_RESERVE))
    if needed > room:
        reason = (
            f"{shape.name} needs {gigabytes(needed)} of each node while it loads, and a node has"
            f" {gigabytes(room)} to spare; take more --nodes, a smaller dtype or another machine"
        )
        raise LaunchImpossible(param="model", value=order.model, reason=reason)
    where = "one node" if nodes == 1 else f"each of {nodes} nodes"
    text = f"{gigabytes(needed)} of {gigabytes(room)} on {where}, processors only"
    return Fit(text=text, weight_bytes=weights)


def _find(kind: NodeKind) -> Device | None:
    """Return the device that a site file means; one that comes in two sizes is not guessed."""
    words = (kind.device or "").split()
    name = words[-1].upper() if words else ""
    sized = f"{name}-{kind.device_memory_gb:g}" if kind.device_memory_gb else name
    return DEVICES.get(sized) or DEVICES.get(name)


def _weight_bytes(order: Order, shape: ModelShape) -> int:
    return shape.parameters * _BYTES.get(order.options.dtype or "bfloat16", 2)
