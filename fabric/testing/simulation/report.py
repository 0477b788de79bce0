"""What users and accounts noticed of a simulated trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How one request ended, ``total_s`` after it came at ``at_s``. A failed one took its whole
    deadline; ``slo_s`` was acceptable, and ``alone_s`` is what it takes on an idle replica."""

    run_id: str
    project: str
    at_s: float
    slo_s: float
    alone_s: float
    total_s: float
    charge_usu: int
    attempts: int
    site: str | None
    completed: bool


@dataclass(slots=True, kw_only=True)
class Report:
    """Measures of one policy over one trace."""

    policy: str
    ends: list[End] = field(default_factory=list)
    bytes_moved: int = 0
    num_cold_starts: int = 0

    def percentile_s(self, percent: float) -> float:
        """Return a percentile of the time from arrival to the last token, failures included."""
        return float(np.percentile([end.total_s for end in self.ends], percent))

    @property
    def attainment(self) -> float:
        """Share of the requests that were answered in acceptable time."""
        kept = [end.completed and end.total_s <= end.slo_s for end in self.ends]
        return sum(kept) / len(kept)

    @property
    def spent_su(self) -> float:
        """Service units charged."""
        return sum(end.charge_usu for end in self.ends) / 1e6

    @property
    def num_failed(self) -> int:
        """Requests without an answer."""
        return sum(not end.completed for end in self.ends)

    @property
    def fairness(self) -> float:
        """Jain's index over projects of how fast their requests were, relative to an idle replica.

        Source: Jain, Chiu and Hawe, A Quantitative Measure of Fairness, DEC TR-301, 1984.
        """
        speeds = defaultdict(list)
        for end in self.ends:
            speed = end.alone_s / end.total_s if end.completed and end.total_s else 0.0
            speeds[end.project].append(speed)
        return jain([sum(those) / len(those) for those in speeds.values()])

    def row(self) -> dict[str, float | int | str]:
        """Return the measures by name, for a table or a file."""
        return {
            "policy": self.policy,
            "p50_s": round(self.percentile_s(50), 3),
            "p95_s": round(self.percentile_s(95), 3),
            "p99_s": round(self.percentile_s(99), 3),
            "attainment": round(self.attainment, 4),
            "spent_su": round(self.spent_su, 4),
            "moved_gb": round(self.bytes_moved / 1e9, 2),
            "fairness": round(self.fairness, 4),
            "failed": self.num_failed,
            "cold_starts": self.num_cold_starts,
        }


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index: 1 if all are alike, 1/n if one has everything."""
    squares = len(shares) * sum(share * share for share in shares)
    return sum(shares) ** 2 / squares if squares else 1.0
