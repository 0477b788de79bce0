"""What a run does in a step, and what it does in every step of decoding alike.

Shapes: F features of a point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fabric.messages import nodes as ops


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The nodes of one step: those before any point, and by point those from there to the next."""

    opening: tuple[int, ...]
    at: dict[str, tuple[int, ...]]


IDLE = StepPlan((), {})


@dataclass(frozen=True, slots=True)
class Steady:
    """What a run does in every step of decoding, by point, where it is this and nothing else."""

    adds: dict[str, Tensor]
    """Vectors that are added to its token, [F] each."""
    saves: dict[str, tuple[int, ...]]
    """The nodes that save what stands there."""


def simplified(
    plan: StepPlan, nodes: Sequence[ops.Node], adds: Mapping[int, Tensor]
) -> Steady | None:
    """Return a plan as plain additions and saves, if it is nothing else.

    Args:
        plan: Of every step of decoding.
        nodes: The run's.
        adds: By node that adds the same vector in all steps, the vector.
    """
    added, saved = {}, {}
    for point, here in plan.at.items():
        if len(here) == 1 and here[0] in adds:
            added[point] = adds[here[0]]
        elif (kept := _only_saves(here, nodes)) is not None:
            saved[point] = kept
        else:
            return None
    return None if plan.opening else Steady(added, saved)


def plain_add(node: ops.Node) -> int | None:
    """Return the value that a node adds as it is to every token it takes; ``None``: it does more
    than that."""
    match node:
        case ops.Write(mode="add", norm="none", gate=None, mask=None, x=x, sel=sel):
            return x if sel.heads is None and sel.dims is None else None
    return None


def added_vector(node: ops.Node, x: Tensor, like: Tensor) -> Tensor | None:
    """Return what a plain addition adds to a token, [F] in the dtype of ``like`` [..., F].

    ``None`` where it is no vector, or not finite: then the node itself has to say what is wrong.
    """
    assert isinstance(node, ops.Write)
    if x.dim() >= 2:
        return None
    vector_F = (x.to(like) * node.alpha).expand(1, like.shape[-1])[0]
    return vector_F if bool(vector_F.isfinite().all()) else None


def _only_saves(here: Sequence[int], nodes: Sequence[ops.Node]) -> tuple[int, ...] | None:
    """Return the saves among nodes that read a token and save it, if there is no more."""
    read, *saves = here
    match nodes[read]:
        case ops.Read(sel=sel) if sel.heads is None and sel.dims is None:
            for k in saves:
                node = nodes[k]
                if not isinstance(node, ops.Save) or node.x != read or node.stream:
                    return None
            return tuple(saves)
    return None
