"""How long a job will wait, by what jobs like it have waited: upper bounds, not means.

Waits of batch jobs have heavy tails and change their distribution without notice, so no mean and
no fitted distribution says when a job will have started. An order statistic does: of ``n`` waits,
the number not above the true quantile ``q`` is binomial, whatever the distribution.

Source: J. Brevik, D. Nurmi, R. Wolski, "Predicting bounds on queuing delay for batch-scheduled
parallel machines", PPoPP 2006; D. Nurmi, J. Brevik, R. Wolski, "QBETS: queue bounds estimation from
time series", JSSPP 2007.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from fabric.errors import RequestInvalid

CONFIDENCE = 0.95
QUANTILES = {"p50": 0.5, "p90": 0.9}
RUN_PROBABILITY = 0.001
"""Misses in a row that are less likely than this mean that the waits have changed."""

_WATCHED = "p90"
_MAX_WAITS = 1000
_WALLTIMES_S = (1800, 7200, 21_600, 86_400)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitForecast:
    """Quantiles of a wait in seconds; ``None`` where nobody knows.

    Attributes:
        p50_s: What the scheduler says, or else the bound of the median.
        p90_s: A wait that the job exceeds in at most one case of ten, with ``CONFIDENCE`` as far as
            it comes from recorded waits.
        num_waits: How many recorded waits the bounds are made of; with 0, what the scheduler says
            is all there is.
    """

    p50_s: float | None
    p90_s: float | None
    num_waits: int


@lru_cache(maxsize=4096)
def get_rank(num_waits: int, quantile: float, confidence: float = CONFIDENCE) -> int | None:
    """Return which of the sorted waits, counted from 1, bounds a quantile from above.

    It is the least ``k`` with ``P(Binomial(num_waits, quantile) < k) >= confidence``.

    Returns:
        ``None`` when there are too few waits for any bound.
    """
    logs = math.log(quantile), math.log1p(-quantile)
    cumulated = 0.0
    for k in range(num_waits):
        cumulated += math.exp(
            math.lgamma(num_waits + 1)
            - math.lgamma(k + 1)
            - math.lgamma(num_waits - k + 1)
            + k * logs[0]
            + (num_waits - k) * logs[1]
        )
        if cumulated >= confidence:
            return k + 1
    return None


@lru_cache(maxsize=64)
def get_least_waits(quantile: float, confidence: float = CONFIDENCE) -> int:
    """Return how many waits the first bound of a quantile needs: 29 for 0.9, 59 for 0.95."""
    return math.ceil(math.log1p(-confidence) / math.log(quantile))


def get_run_length(quantile: float) -> int:
    """Return how many misses in a row mean a change: 3 for 0.9 and above."""
    return math.ceil(math.log(RUN_PROBABILITY) / math.log1p(-quantile) - 1e-9)


@dataclass(slots=True)
class WaitHistory:
    """The waits of jobs of one kind, in the order in which they ended.

    When several in a row exceed the bound that was told before each, what is older than the least
    that a bound needs is forgotten. A change to shorter waits leaves bounds valid, only loose,
    until ``max_waits`` newer ones have come.
    """

    max_waits: int = _MAX_WAITS
    _waits: deque[float] = field(default_factory=deque)
    _sorted: list[float] = field(default_factory=list)
    _misses: int = 0

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, wait_s: float) -> None:
        """Record the wait of a job that has started.

        Raises:
            RequestInvalid: It is negative or not finite.
        """
        if not (math.isfinite(wait_s) and wait_s >= 0):
            reason = "a wait is a number of seconds from 0 on"
            raise RequestInvalid(param="wait_s", value=wait_s, reason=reason)
        quantile = QUANTILES[_WATCHED]
        bound_s = self.get_bound_s(quantile)
        self._misses = self._misses + 1 if bound_s is not None and wait_s > bound_s else 0
        self._waits.append(wait_s)
        insort(self._sorted, wait_s)
        if self._misses >= get_run_length(quantile):
            self._misses = 0
            self._keep(get_least_waits(quantile))
        self._keep(self.max_waits)

    def get_bound_s(self, quantile: float) -> float | None:
        """Return the upper bound of a quantile, or ``None`` when there are too few waits."""
        rank = get_rank(len(self._waits), quantile)
        return None if rank is None else self._sorted[rank - 1]

    def _keep(self, num_waits: int) -> None:
        while len(self._waits) > num_waits:
            del self._sorted[bisect_left(self._sorted, self._waits.popleft())]


_Kind = tuple[str, int | None, int | None]


class WaitEstimator:
    """Bounds of the wait at one site: by queue, number of nodes and walltime.

    Jobs are alike when they ask for the same queue, the same power of two of nodes and a like
    walltime. Where too few of these have waited, those of like nodes stand for them, and then those
    of the queue.
    """

    def __init__(self) -> None:
        self._histories: dict[_Kind, WaitHistory] = {}

    def record(self, queue: str, *, nodes: int, walltime_s: float, wait_s: float) -> None:
        """Record how long a job has waited; in the order in which the jobs started.

        Raises:
            RequestInvalid: The wait is negative or not finite.
        """
        for kind in _get_kinds(queue, nodes, walltime_s):
            self._histories.setdefault(kind, WaitHistory()).add(wait_s)

    def forecast(
        self, queue: str, *, nodes: int, walltime_s: float, hint_s: float | None = None
    ) -> WaitForecast:
        """Return how long a job would wait.

        Args:
            queue: The queue, partition or quality of service.
            nodes: How many nodes it asks for.
            walltime_s: How long it asks for them.
            hint_s: What the scheduler says of this very job (``fabric.launch.waits``). It knows the
                queue of this moment, so this is the median, and no bound is below it.
        """
        history = self._find(_get_kinds(queue, nodes, walltime_s))
        bounds = {name: history.get_bound_s(share) for name, share in QUANTILES.items()}
        p50_s = bounds["p50"] if hint_s is None else hint_s
        p90_s = max((each for each in (bounds["p90"], hint_s) if each is not None), default=None)
        return WaitForecast(p50_s=p50_s, p90_s=p90_s, num_waits=len(history))

    def _find(self, kinds: Iterable[_Kind]) -> WaitHistory:
        for kind in kinds:
            history = self._histories.get(kind)
            if history and len(history) >= get_least_waits(QUANTILES[_WATCHED]):
                return history
        return WaitHistory()


def _get_kinds(queue: str, nodes: int, walltime_s: float) -> tuple[_Kind, _Kind, _Kind]:
    """Return what a job is like, the closest first."""
    num_nodes = max(1, nodes).bit_length()
    walltime = bisect_left(_WALLTIMES_S, walltime_s)
    return (queue, num_nodes, walltime), (queue, num_nodes, None), (queue, None, None)
