"""Rates from measurements: what tokens take of a device, found from runs that it served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from itertools import combinations

from fabric.errors import MeasurementInsufficient

MIN_RUNS = 20
CACHED_SHARE = Decimal("0.1")
"""What a cached prompt token takes of an uncached one's where no run says it."""

_QUANTUM = Decimal("0.000001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run: its tokens, and its share of the device's seconds."""

    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds of a device for each token, by least squares over runs.

    ``r2`` is the part of the variance of the runs' seconds that they explain;
    ``cached_was_seen`` is false where no run had cached tokens, and their part was assumed.
    """

    prompt_s: float
    cached_prompt_s: float
    output_s: float
    cached_was_seen: bool
    num_runs: int
    r2: float

    def prices(self, usu_per_device_s: Decimal) -> Mapping[str, Decimal]:
        """Return what the tokens cost where a device's second costs so much, in micro-SU."""
        taken_s = {
            "prompt_usu": self.prompt_s,
            "cached_prompt_usu": self.cached_prompt_s,
            "output_usu": self.output_s,
        }
        return {
            name: (Decimal(seconds) * usu_per_device_s).quantize(_QUANTUM, ROUND_CEILING)
            for name, seconds in taken_s.items()
        }


def usu_per_device_s(su_per_node_hour: Decimal, num_devices: int, devices_per_node: int) -> Decimal:
    """Return what a second of an instance costs, in micro-SU.

    Source: the usual charge of centres, node-hours for the part of a node that is held.

    Args:
        su_per_node_hour: What the centre charges for a node.
        num_devices: Of the instance.
        devices_per_node: Of the node.
    """
    return su_per_node_hour * 1_000_000 / 3600 * num_devices / devices_per_node


def measure(samples: Iterable[Sample], *, model: str = "*", site: str = "*") -> Measured:
    """Return what tokens take: the least squares among those that let no token take less than
    nothing.

    With three kinds of tokens the bounded problem is solved exactly: of all sets of kinds that
    take something, the best whose plain solution is nowhere negative.

    Raises:
        MeasurementInsufficient: There are too few runs, or they are too much alike.
    """
    import numpy as np

    runs = [sample for sample in samples if sample.device_s > 0]

    def refuse(reason: str) -> MeasurementInsufficient:
        return MeasurementInsufficient(model=model, site=site, num_runs=len(runs), reason=reason)

    if len(runs) < MIN_RUNS:
        raise refuse(f"at least {MIN_RUNS} are needed")
    tokens_RK = np.array([_tokens(run) for run in runs], dtype=float)  # R runs, K kinds of tokens
    seconds_R = np.array([run.device_s for run in runs])
    seen = [kind for kind in range(3) if tokens_RK[:, kind].any()]
    if np.linalg.matrix_rank(tokens_RK[:, seen]) < len(seen):
        raise refuse("all have their kinds of tokens in the same proportion")

    def fit(kinds: Sequence[int]) -> tuple[float, list[float]]:
        taken_s = [0.0] * 3
        found, *_ = np.linalg.lstsq(tokens_RK[:, kinds], seconds_R, rcond=None)
        for kind, value in zip(kinds, found, strict=True):
            taken_s[kind] = float(value)
        return float(((tokens_RK @ taken_s - seconds_R) ** 2).sum()), taken_s

    sets = (kinds for size in range(len(seen)) for kinds in combinations(seen, size + 1))
    error, taken_s = min(one for kinds in sets if min((one := fit(kinds))[1]) >= 0)
    spread = float(((seconds_R - seconds_R.mean()) ** 2).sum())
    prompt_s, cached_s, output_s = taken_s
    cached_was_seen = 1 in seen
    return Measured(
        prompt_s=prompt_s,
        cached_prompt_s=cached_s if cached_was_seen else prompt_s * float(CACHED_SHARE),
        output_s=output_s,
        cached_was_seen=cached_was_seen,
        num_runs=len(runs),
        r2=1 - error / spread if spread else 0.0,
    )


def _tokens(run: Sample) -> tuple[int, int, int]:
    cached = run.cached_prompt_tokens
    return run.prompt_tokens - cached, cached, run.output_tokens
