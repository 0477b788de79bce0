"""What a program of a tier may take at most: data, for an operator to replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fabric.errors import ProgramTooLarge


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramCaps:
    """Caps of one program.

    Args:
        runs: Runs.
        nodes: Nodes of all runs.
        constants_bytes: Constants and artifacts together.
        generated_tokens: Tokens of all runs.
        value_bytes: One node's value in one step.
        working_bytes: All values of one run in one step.
        result_bytes: What all runs save.
        flops: Floating-point operations, forward passes and nodes.
    """

    runs: int = 1024
    nodes: int = 65_536
    constants_bytes: int = 64 * 2**20
    generated_tokens: int = 16_384
    value_bytes: int = 2**30
    working_bytes: int = 16 * 2**30
    result_bytes: int = 256 * 2**20
    flops: int = 10**17

    def hold(self, cap: str, value: int) -> None:
        """Raise ProgramTooLarge when ``value`` is over the cap of this name."""
        limit: int = getattr(self, cap)
        if value > limit:
            raise ProgramTooLarge(cap=cap.replace("_", " "), value=value, limit=limit)


CAPS: Mapping[str, ProgramCaps] = MappingProxyType(
    {
        "interactive": ProgramCaps(
            nodes=16_384,
            constants_bytes=16 * 2**20,
            generated_tokens=2048,
            working_bytes=4 * 2**30,
            result_bytes=64 * 2**20,
            flops=10**16,
        ),
        "standard": ProgramCaps(),
        "batch": ProgramCaps(
            nodes=262_144,
            generated_tokens=262_144,
            working_bytes=64 * 2**30,
            result_bytes=2**30,
            flops=10**19,
        ),
    }
)
"""By tier."""
