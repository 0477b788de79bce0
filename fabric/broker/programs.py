"""What an intervention program may take at most: held before it is sent, and never exceeded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fabric.broker.facts import ReplicaSnapshot
from fabric.broker.pool import (
    MIN_TOKENS_PER_S,
    PRIOR_DECODE_TOKENS_PER_S,
    PRIOR_PREFILL_TOKENS_PER_S,
)
from fabric.messages import PointManifest, Program
from fabric.messages.nodes import Save
from fabric.programs import Checked

MARGIN = 4.0
"""How much longer than expected a program may compute and be charged for it."""
LEAST_DEVICE_S = 1.0
MAX_DEVICE_S = {"interactive": 60.0, "standard": 600.0, "batch": 3600.0}
"""What a program may compute at most, by tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramBounds:
    """The most that one admitted program consumes.

    Args:
        program: The SHA-256 of its canonical JSON: all that a record keeps of it.
        scopes: The permissions it takes.
        num_flops: Floating-point operations.
        prompt_tokens: Tokens of all prompts.
        max_tokens: Tokens that each run generates, in the order of its runs.
        run_ids: The runs' ids, in the same order.
        saving: Runs that return something at their end.
        hook_bytes_in: Bytes of its constants.
        hook_bytes_out: Bytes of what it saves.
        device_s: Seconds of computing that it is charged for.
    """

    program: str
    scopes: frozenset[str]
    num_flops: int
    prompt_tokens: int
    max_tokens: tuple[int, ...]
    run_ids: tuple[str, ...]
    saving: frozenset[str]
    hook_bytes_in: int
    hook_bytes_out: int
    device_s: float

    @property
    def output_tokens(self) -> int:
        """Tokens that all runs generate."""
        return sum(self.max_tokens)


def get_bounds(
    checked: Checked,
    manifest: PointManifest,
    replicas: Iterable[ReplicaSnapshot],
    *,
    digest: str,
    prompt_tokens: int,
    tier: str,
) -> ProgramBounds:
    """Return what a checked program takes at most.

    Args:
        checked: The program, as it was found valid.
        manifest: The model's points.
        replicas: Those that may run it; the slowest of them sets the seconds.
        digest: What ``get_digest`` says of the program as it was sent.
        prompt_tokens: At least as many tokens as its prompts have.
        tier: A key of ``MAX_DEVICE_S``.
    """
    program = checked.program
    max_tokens = tuple(run.gen.max_tokens for run in program.runs)
    expected_s = max(
        (
            _device_s(one, manifest, checked.num_flops, prompt_tokens, sum(max_tokens))
            for one in replicas
        ),
        default=0.0,
    )
    allowed_s = min(program.limits.device_s, MAX_DEVICE_S[tier])
    return ProgramBounds(
        program=digest,
        scopes=frozenset(f"program:{scope}" for scope in checked.scopes) | {"program:read"},
        num_flops=checked.num_flops,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        run_ids=tuple(run.id for run in program.runs),
        saving=frozenset(run.id for run in program.runs if _saves_at_end(run.nodes)),
        hook_bytes_in=checked.hook_bytes_in,
        hook_bytes_out=checked.result_bytes,
        device_s=min(allowed_s, max(LEAST_DEVICE_S, MARGIN * expected_s)),
    )


def get_digest(program: Program) -> str:
    """Return the SHA-256 of a program's canonical JSON: sorted, compact, without defaults; its
    constants by their own SHA-256, wherever they are."""
    elsewhere = {"consts": {"data", "handle"}}
    fields = program.model_dump(mode="json", exclude_defaults=True, exclude=elsewhere)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _device_s(
    replica: ReplicaSnapshot,
    manifest: PointManifest,
    num_flops: int,
    prompt_tokens: int,
    output_tokens: int,
) -> float:
    """Return the seconds a replica is expected to compute, by the rates it was seen to have."""
    prefill = replica.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
    decode = replica.decode_tokens_per_s or PRIOR_DECODE_TOKENS_PER_S
    prefill, decode = max(MIN_TOKENS_PER_S, prefill), max(MIN_TOKENS_PER_S, decode)
    # A forward pass takes two operations a parameter and token.
    flops_per_s = 2.0 * max(1, manifest.num_parameters) * prefill
    computed_s = max(prompt_tokens / prefill, num_flops / flops_per_s)
    return (computed_s + output_tokens / decode) * replica.correction


def _saves_at_end(nodes: Collection[object]) -> bool:
    return any(isinstance(node, Save) and not node.stream for node in nodes)
