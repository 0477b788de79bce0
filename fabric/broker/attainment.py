"""Attainment: for how many requests each tier's promise was kept, over sliding windows.

An answer that comes counts, with its times; so does one that does not come by the fault of the
fabric, a refusal because of load among them. What a caller got wrong, or cancelled, does not. The
error budget is what a promise allows to be missed: 1 is all of it left, below 0 is overspent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Final, Literal

from fabric.broker.signals import Outcome, Ticket
from fabric.broker.tiers import PROMISES, Promise, Tier, tier_of
from fabric.errors import FabricError
from fabric.messages import Failure, Request, RunState

Measure = Literal["first_token", "token", "answered"]
"""What is promised: a first token in time, tokens at a pace, an answer at all."""

WINDOWS: Final[Mapping[str, float]] = MappingProxyType(
    {"5m": 300.0, "1h": 3_600.0, "6h": 21_600.0, "24h": 86_400.0}
)
"""Seconds, by name."""
Promises = Mapping[Tier, Promise]

STEP_S = 10.0
"""How exactly a window begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attained:
    """How far one promise of a tier was kept in one window.

    Args:
        tier: The tier.
        measure: What was promised.
        limit_s: Its bound in seconds, if it has one.
        objective: The part of the requests for which it is promised.
        window: A key of ``WINDOWS``.
        num_requests: Of which it can be said.
        attained: The part for which it was kept; ``None`` if there were none.
        budget_left: The part of what may be missed that is left.
    """

    tier: Tier
    measure: Measure
    limit_s: float | None
    objective: float
    window: str
    num_requests: int
    attained: float | None
    budget_left: float


@dataclass(slots=True)
class _Step:
    """Requests (all, and those for which it was kept) that ended within ``STEP_S``."""

    ends_at: float
    counts: dict[tuple[Tier, Measure], list[int]] = field(default_factory=dict)

    def add(self, tier: Tier, measure: Measure, kept: bool) -> None:
        both = self.counts.setdefault((tier, measure), [0, 0])
        both[0] += 1
        both[1] += kept


class Attainment:
    """What was promised and kept since the hub came up. Its memory is a day, in steps."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque(maxlen=int(max(WINDOWS.values()) / STEP_S) + 1)

    def ended(self, now: float, outcome: Outcome, promises: Promises = PROMISES) -> None:
        """A run that was admitted is over; what is promised now counts."""
        if not isinstance(outcome.ticket, Ticket) or outcome.state is RunState.CANCELLED:
            return
        tier = tier_of(outcome.ticket.request)
        if outcome.state is not RunState.COMPLETED:
            if is_ours(outcome.failure_code):
                self._step(now).add(tier, "answered", False)
            return
        step, promise = self._step(now), promises[tier]
        deadline_s = outcome.ticket.request.deadline_s
        step.add(tier, "answered", outcome.total_s <= deadline_s)
        if promise.first_token_s is not None and outcome.first_s is not None:
            step.add(tier, "first_token", outcome.first_s <= promise.first_token_s)
        if promise.token_s is not None and outcome.token_s is not None:
            step.add(tier, "token", outcome.token_s <= promise.token_s)

    def refused(self, now: float, request: Request, error: FabricError) -> None:
        """A request was not admitted. Batch work is asked again by whoever runs the batch."""
        if request.tier != "batch" and error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._step(now).add(tier_of(request), "answered", False)

    def report(self, now: float, promises: Promises = PROMISES) -> list[Attained]:
        """Return how far each promise was kept in each window."""
        return [
            self._attained(now, tier, promise, measure, window)
            for tier, promise in promises.items()
            for measure in _measures(promise)
            for window in WINDOWS
        ]

    def _attained(
        self, now: float, tier: Tier, promise: Promise, measure: Measure, window: str
    ) -> Attained:
        since = now - WINDOWS[window]
        steps = (step.counts.get((tier, measure)) for step in self._steps if step.ends_at > since)
        counted = [both for both in steps if both is not None]
        num, num_kept = (sum(both[at] for both in counted) for at in (0, 1))
        is_answer = measure == "answered"
        objective = promise.share_answered if is_answer else promise.share_in_time
        limits_s = {"first_token": promise.first_token_s, "token": promise.token_s}
        return Attained(
            tier=tier,
            measure=measure,
            limit_s=limits_s.get(measure),
            objective=objective,
            window=window,
            num_requests=num,
            attained=num_kept / num if num else None,
            budget_left=1.0 - (num - num_kept) / (num * (1.0 - objective)) if num else 1.0,
        )

    def _step(self, now: float) -> _Step:
        if not self._steps or now >= self._steps[-1].ends_at:
            self._steps.append(_Step(ends_at=now + STEP_S))
        return self._steps[-1]


def is_ours(failure_code: str | None) -> bool:
    """Whether a failure is the fabric's and not the caller's."""
    error = Failure(code=failure_code or "", message="", detail={}).to_error()
    return error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _measures(promise: Promise) -> list[Measure]:
    measures: list[Measure] = ["answered"]
    if promise.first_token_s is not None:
        measures.insert(0, "first_token")
    if promise.token_s is not None:
        measures.insert(1, "token")
    return measures
