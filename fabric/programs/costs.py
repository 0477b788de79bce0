"""Bounds of what a program computes and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fabric.messages import nodes as n
from fabric.messages.points import PointManifest
from fabric.messages.program import ProgramRun
from fabric.programs.model_ops import NUM_STATS, matmul_weight, matrix
from fabric.programs.selection import Extent
from fabric.programs.shapes import Value

_ELEMENTWISE = 8


def forward_flops(manifest: PointManifest, run: ProgramRun, extent: Extent) -> int:
    """Return a bound of a run's forward passes (and its backward passes, where it has any).

    Two operations a parameter and token, and four a layer, hidden size and pair of tokens; a
    backward pass takes twice as many.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1.
    """
    tokens = extent.num_positions
    pairs = tokens * (tokens + 1) // 2
    once = 2 * manifest.num_parameters * tokens + 4 * manifest.num_layers * manifest.hidden * pairs
    return once * (1 + 2 * sum(isinstance(node, n.Grad) for node in run.nodes))


def node_flops(
    manifest: PointManifest, node: n.Node, args: Sequence[Value], value: Value | None
) -> int:
    """Return a bound of what a node computes in all steps."""
    numbers = max([arg.most_of_all_steps for arg in args], default=0)
    if value is not None:
        numbers = max(numbers, value.most_of_all_steps)
    match node:
        case n.Matmul() | n.Linear() if value is not None:
            return 2 * value.most_of_all_steps * args[0].shape[-1].most
        case n.Einsum() if value is not None:
            return len(args) * value.num_steps * _product_of_letters(node, args)
        case n.Unembed():
            return 2 * numbers * manifest.hidden
        case n.Module() if node.module.startswith("layers."):
            return 2 * manifest.num_parameters * numbers // manifest.hidden + 4 * numbers * numbers
        case n.Module() if value is not None:
            num_out, num_in = matrix(manifest, matmul_weight(manifest, node.module))
            rows = args[0].most_of_all_steps // max(1, num_in)
            return 2 * rows * num_in * num_out
        case n.WeightRead():
            return NUM_STATS * math.prod(manifest.weights[node.name])
        case n.Concat():
            return sum(arg.most_of_all_steps for arg in args)
        case _:
            return _ELEMENTWISE * numbers


def einsum_intermediate(node: n.Einsum, args: Sequence[Value]) -> int:
    """Return the numbers of the largest product on the way, operands taken from left to right."""
    taken, _, result = node.equation.partition("->")
    operands = [set(operand) for operand in taken.split(",")]
    sizes = _sizes(node, args)
    held, largest = operands[0], 0
    for place, operand in enumerate(operands[1:], start=1):
        wanted = set(result).union(*operands[place + 1 :])
        held = (held | operand) & wanted
        largest = max(largest, math.prod(sizes[letter] for letter in held))
    return largest


def _product_of_letters(node: n.Einsum, args: Sequence[Value]) -> int:
    return math.prod(_sizes(node, args).values())


def _sizes(node: n.Einsum, args: Sequence[Value]) -> dict[str, int]:
    operands = node.equation.partition("->")[0].split(",")
    return {
        letter: axis.most
        for operand, arg in zip(operands, args, strict=True)
        for letter, axis in zip(operand, arg.shape, strict=True)
    }
