"""A program that has been checked: what is known of it before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fabric.messages.points import Lane
from fabric.messages.program import Program, ProgramRun

Scope = Literal["read", "write", "gradient", "weights"]
"""What a key must permit."""

LANES: tuple[Lane, ...] = ("graph", "boundary", "eager", "recompute", "autograd")
"""Cheapest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedNode:
    """One node.

    Args:
        op: As on the wire.
        shape: Of its value in one step; of what it changes; of what it saves, joined. Axes that
            are not known yet have names: ``T`` positions, ``S`` keys.
        dtype: Of that value.
        lane: The cheapest that serves it.
        num_steps: How often it is evaluated at most; 1 for what is the same in all steps. A save
            of more than one is joined: concatenated along its positions, or stacked.
        positions: Whether its first axis are the positions of a selection.
    """

    op: str
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    lane: Lane = "graph"
    num_steps: int = 1
    positions: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """One run.

    Args:
        run: As it was given.
        depends_on: The runs whose saves it takes.
        nodes: Its nodes, in order.
        affects_prefill: Whether it changes what the prompt's keys and values are.
        earliest_read: The first position of the prompt that it reads, or -n for the n-th from an
            end that is not known yet; ``None`` where it reads none.
        num_flops: A bound of its operations.
        result_bytes: A bound of what it saves.
    """

    run: ProgramRun
    depends_on: tuple[str, ...]
    nodes: tuple[CheckedNode, ...]
    affects_prefill: bool
    earliest_read: int | None
    num_flops: int
    result_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A valid program.

    Args:
        program: As it was given.
        runs: Every run after those that it depends on.
        num_flops: A bound of the operations of its forward passes and nodes.
        result_bytes: A bound of the safetensors files of all runs.
        hook_bytes_in: The constants and artifacts that it brings.
        scopes: What the key must permit.
        lane: The dearest of all nodes' and overlays'.
    """

    program: Program
    runs: tuple[CheckedRun, ...]
    num_flops: int
    result_bytes: int
    hook_bytes_in: int
    scopes: frozenset[Scope]
    lane: Lane


def dearest(*lanes: Lane) -> Lane:
    """Return the dearest of the lanes; of none, the cheapest there is."""
    return max(lanes, key=LANES.index, default=LANES[0])
