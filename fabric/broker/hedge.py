"""A second attempt beside a first that has said nothing for longer than almost all do.

Until one of them says something nothing has been delivered, so either may go on alone: the other
is abandoned, and only what was delivered is charged.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from fabric.broker.cost import data_s, times_s
from fabric.broker.facts import Context, ReplicaSnapshot
from fabric.broker.settings import BrokerSettings
from fabric.messages import Embedding, Event, Finished, Placement, PromptScored, Request, Token

MAX_RATIOS = 500
REFRESH = 20
"""Observations after which the quantile is computed anew."""

ANSWERS = (Token, PromptScored, Embedding, Finished)
"""What decides between two attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hedge:
    """The second attempt of a run, as it was sent."""

    attempt: int
    placement: Placement
    predicted: ReplicaSnapshot
    sent_at: float
    silent_until: float | None

    @property
    def instance(self) -> str:
        """Where it is."""
        return self.placement.instance


class Waits:
    """How long first answers take over what was expected, of the last few hundred attempts."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._ratios: deque[float] = deque(maxlen=MAX_RATIOS)
        self._num_new = 0
        self._quantile = math.inf

    def observe(self, waited_s: float, expected_s: float) -> None:
        """Note how long one attempt took, or was waited for in vain."""
        if expected_s <= 0:
            return
        self._ratios.append(waited_s / expected_s)
        self._num_new += 1
        is_known = len(self._ratios) >= self._settings.hedge_samples
        if is_known and (self._num_new >= REFRESH or self._quantile == math.inf):
            ordered = sorted(self._ratios)
            self._quantile = ordered[int(self._settings.hedge_quantile * (len(ordered) - 1))]
            self._num_new = 0

    def patience_s(self, expected_s: float) -> float:
        """Return the seconds after which a silent attempt is among the slowest; infinite as long
        as too few are known."""
        if self._settings.hedge_quantile >= 1.0:
            return math.inf
        return max(self._settings.hedge_min_s, self._quantile * expected_s)


def first_answer_s(request: Request, snapshot: ReplicaSnapshot, context: Context) -> float:
    """Return the seconds until a replica is expected to say something: data, queue and prompt."""
    times = times_s(request, snapshot, context.lengths)
    own_s = times.first_s * (1.0 + times.share)
    return data_s(request, snapshot.site, context) + times.cold_s + times.wait_s + own_s


def may_hedge(request: Request, snapshot: ReplicaSnapshot) -> bool:
    """Return whether a second attempt may be sent: it would repeat nothing but computing, and the
    first is not silent because it must be started."""
    return request.mode == "query" and snapshot.cold_p == 0.0


def suits(request: Request, other: ReplicaSnapshot, context: Context) -> bool:
    """Return whether a replica may take the second attempt: it has a free row, moves no data, is
    paid from the hold as it is, and has not failed the request."""
    offer = context.offers[other.site]
    return (
        other.instance not in context.tried
        and other.num_busy + request.sampling.n <= other.max_rows
        and other.cold_p == 0.0
        and data_s(request, other.site, context) == 0.0
        and offer.allocation == context.held_allocation
        and offer.max_charge_usu <= context.held_usu
    )


def is_answer(event: Event) -> bool:
    """Return whether an event is the first word of an attempt that the client will hear."""
    return isinstance(event, ANSWERS)
