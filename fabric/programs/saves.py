"""What a save is once its run has ended: its steps' values joined, then reduced."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fabric.messages import nodes as n
from fabric.programs.constants import ITEM_BYTES
from fabric.programs.pure import needs_float
from fabric.programs.selection import Extent
from fabric.programs.shapes import Axis, Shape, Unfit, Value, number, told, unknown

HEADER_BYTES = 512
"""What a tensor's entry in a safetensors file takes besides its name, and its share of the rest."""
_LABEL_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A save as other runs and the user see it.

    Args:
        shape: Of the joined value; of one step's where it is streamed.
        dtype: As it is saved.
        positions: Whether its first axis are positions.
        streamed: Whether each step's goes out by itself.
        num_bytes: A bound of what it takes in files.
    """

    shape: Shape
    dtype: str
    positions: bool
    streamed: bool
    num_bytes: int


def join_steps(node: n.Save, value: Value, extent: Extent, *, is_read: bool) -> Joined:
    """Return what a save gives.

    Args:
        node: The save.
        value: What it saves.
        extent: Of its run.
        is_read: Whether that is read at a point, unchanged: what has an axis of keys is then filled
            up to the last step's.

    Raises:
        Unfit: Its shape changes from step to step, or its reduction does not fit.
    """
    dtype = node.dtype or value.dtype
    sure = extent.exact and not extent.ends_early
    several = value.num_steps > 1
    labels = 0
    if node.stream or not several:
        shape, positions = value.shape, value.positions
    else:
        shape, positions = _joined(node, value, sure, is_read), value.positions
    if node.reduce is not None:
        _needs_reducible(node, shape, value)
        shape, positions = shape[1:], False
    if positions:
        labels = shape[0].most
    times = value.num_steps if node.stream else 1
    numbers = math.prod(axis.most for axis in shape)
    if node.stream and node.reduce is None:
        numbers, times = value.most_of_all_steps, 1
    overhead = value.num_steps * (HEADER_BYTES + 2 * len(node.name)) + labels * _LABEL_BYTES
    return Joined(
        shape=shape,
        dtype=dtype,
        positions=positions,
        streamed=node.stream,
        num_bytes=numbers * times * ITEM_BYTES[dtype] + overhead,
    )


def _joined(node: n.Save, value: Value, sure: bool, is_read: bool) -> Shape:
    rest = value.shape[1:] if value.positions else value.shape
    if is_read and rest and rest[-1].varies:
        rest = (*rest[:-1], _known_or_not(rest[-1].most, f"{node.name}.keys", sure))
    if any(axis.varies for axis in rest):
        raise Unfit(
            f"its shape {told(value.shape)} changes from step to step: save it in one step, with"
            " stream, or with what changes as its first axis, the positions'"
        )
    steps = value.num_steps
    if not value.positions:
        return (_known_or_not(steps, f"{node.name}.steps", sure), *rest)
    first = value.shape[0]
    most = first.total if first.steps == value.steps and first.varies else steps * first.most
    return (_known_or_not(most, f"{node.name}.positions", sure), *rest)


def _known_or_not(most: int, name: str, sure: bool) -> Axis:
    return number(most) if sure else unknown(name, most)


def _needs_reducible(node: n.Save, shape: Shape, value: Value) -> None:
    if not shape:
        raise Unfit(f"reduce {node.reduce!r} takes an axis away and a single number has none")
    if shape[0].most == 0:
        raise Unfit(f"reduce {node.reduce!r} of nothing")
    if node.reduce in ("mean", "norm"):
        needs_float(f"reduce {node.reduce!r}", value)
    if value.dtype == "bool" and node.reduce != "last":
        raise Unfit(f"reduce {node.reduce!r} of truth values has no meaning; cast them first")
