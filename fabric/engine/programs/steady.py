"""What a run does in a step, and what it does in every step of decoding alike.

Shapes: F features of a point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fabric.engine.programs.values import DTYPES, Value
from fabric.messages import nodes as ops


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The nodes of one step: those before any point, and by point those from there to the next."""

    opening: tuple[int, ...]
    at: dict[str, tuple[int, ...]]


IDLE = StepPlan((), {})


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step saves at a point."""

    nodes: dict[int, ops.Save]
    """Those that save it, by their indices."""
    span: slice
    """Which of the step's numbers it is."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steady:
    """What a run does in every step of decoding, by point, where it is this and nothing else."""

    adds: Mapping[str, Tensor]
    """Vectors that are added to its token, [F] each and dense."""
    saves: Mapping[str, Kept]
    num_kept: int
    """Numbers that a step keeps."""
    dtype: torch.dtype
    """Of those."""

    @cached_property
    def sizes(self) -> list[tuple[ops.Save, int]]:
        """Its saves, with the bytes that each adds in a step."""
        return [
            (node, (kept.span.stop - kept.span.start) * self._dtype_of(node).itemsize)
            for kept in self.saves.values()
            for node in kept.nodes.values()
        ]

    def unpacked(self, steps: Sequence[tuple[Tensor, int]]) -> Iterator[tuple[int, Value]]:
        """Return what each save has of steps, of which the numbers and the position are given."""
        if not steps:
            return
        rooms, at = zip(*steps, strict=True)
        kept_TX = torch.stack(rooms)
        for kept in self.saves.values():
            data = kept_TX[:, kept.span].reshape(-1, *kept.shape)
            for k, node in kept.nodes.items():
                yield k, Value(data.to(self._dtype_of(node)), at)

    def _dtype_of(self, node: ops.Save) -> torch.dtype:
        return self.dtype if node.dtype is None else DTYPES[node.dtype]


def simplified(
    plan: StepPlan,
    nodes: Sequence[ops.Node],
    adds: Mapping[int, Tensor],
    values: Mapping[int, Value],
) -> Steady | None:
    """Return a plan as plain additions and saves, if it is nothing else.

    Args:
        plan: Of every step of decoding.
        nodes: The run's.
        adds: By node that adds the same vector in all steps, the vector.
        values: Those of a step of decoding, by node.
    """
    added: dict[str, Tensor] = {}
    saved: dict[str, Kept] = {}
    of_read: dict[int, Kept] = {}
    dtypes = set()
    end = 0
    for point, (first, *others) in plan.at.items():
        node = nodes[first]
        if first in adds:
            added[point] = adds[first]
        elif isinstance(node, ops.Read) and node.sel.heads is node.sel.dims is None:
            x = values[first].data
            shape = x.shape[1:]
            begin, end = end, end + shape.numel()
            saved[point] = of_read[first] = Kept({}, slice(begin, end), shape)
            dtypes.add(x.dtype)
        else:
            return None
        for k in others:
            node = nodes[k]
            if not isinstance(node, ops.Save) or node.stream or node.x not in of_read:
                return None
            of_read[node.x].nodes[k] = node
    if plan.opening or len(dtypes) > 1:
        return None
    dtype = dtypes.pop() if dtypes else torch.float32
    return Steady(adds=added, saves=saved, num_kept=end, dtype=dtype)


def plain_add(node: ops.Write, x: Tensor | None, h: Tensor) -> Tensor | None:
    """Return what a write of ``x`` adds to one token ``h`` [1, F], if it is the same for any token:
    a vector [F]. ``None`` where it does more than that, or what it adds is not finite."""
    plain = node.mode == "add" and node.norm == "none" and node.gate is node.mask is None
    part = node.sel.heads is not None or node.sel.dims is not None
    if not plain or part or x is None or x.dim() > 1 or h.dim() != 2:
        return None
    vector_F = (x.to(h) * node.alpha).expand(h.shape[1]).contiguous()
    return vector_F if bool(vector_F.isfinite().all()) else None
