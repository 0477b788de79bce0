"""What a choice rests on: the replicas at one moment, what each site offers, and the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fabric.broker.lengths import Lengths
from fabric.broker.settings import BrokerSettings
from fabric.messages import InstanceState, Mode

MAX_SCARCITY = 1_000.0
MIN_SCARCITY = 0.1
"""What is about to lapse unspent is cheap, and never free."""
NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """A replica at one moment.

    Args:
        instance: Its name.
        site: Where it runs.
        digest: The model version it serves.
        state: ``READY``, ``DRAINING`` or ``LOST``.
        ejected: Whether it is out after failures in a row.
        context_tokens: The longest row it takes, prompt and output.
        max_rows: Rows it computes at once.
        num_busy: Rows it computes or has waiting, whoever sent them.
        num_in_flight: Attempts this hub has there.
        overhead_s: Observed seconds to the first token of a short prompt.
        prefill_tokens_per_s: Observed; 0 if unknown.
        decode_tokens_per_s: Observed for one row; 0 if unknown.
        failures: Recent failures, decaying with time.
        ends_in_s: Seconds until its block ends, if known.
        correction: Running mean of observed over predicted seconds; predictions are multiplied by
            it.
        cold_p: Probability that it must be started first.
        start_wait_s: Expected seconds in the scheduler's queue if it must.
        load_s: Seconds until the model is loaded after that.
        modes: What it may be asked for.
        adapters: Whether it serves adapters.
        max_in_flight: How many attempts this hub may have there that have rows.
        caches_prefixes: Whether it has been seen to reuse the beginning of a prompt.
    """

    instance: str
    site: str
    digest: str
    state: InstanceState
    ejected: bool
    context_tokens: int
    max_rows: int
    num_busy: int
    num_in_flight: int
    overhead_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    failures: float = 0.0
    ends_in_s: float | None = None
    correction: float = 1.0
    cold_p: float = 0.0
    start_wait_s: float = 0.0
    load_s: float = 0.0
    caches_prefixes: bool = False
    modes: tuple[Mode, ...] = ("query",)
    adapters: bool = False
    max_in_flight: int = NO_LIMIT

    @property
    def cold_s(self) -> float:
        """Expected seconds until it has been started."""
        return self.cold_p * (self.start_wait_s + self.load_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closure:
    """A site's maintenance: from ``begins_s`` to ``ends_s`` of the state's clock; ``until`` is the
    latter in UTC."""

    begins_s: float
    ends_s: float
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What the request would cost at a site, and the allocation that would pay (``None``: none).

    ``available_usu`` is the allocation's free balance; ``scarcity`` compares it with all the
    project may spend (1: as good as everything). Where the rate of spending and the end of the
    period are known, they say it better: 1 means that the balance lasts just as long.
    ``max_in_flight`` is how many requests of this hub the site takes at once; ``closures`` are its
    maintenance, in order. ``lacking_usu`` is what the request counts beside its charge at
    users' own instances, where it is charged nothing: its usual price times what their account
    lacks.
    """

    site: str
    allocation: str | None
    available_usu: int
    max_charge_usu: int
    expected_charge_usu: int
    scarcity: float = 1.0
    burn_usu_per_day: float | None = None
    days_left: float | None = None
    max_in_flight: int | None = None
    closures: tuple[Closure, ...] = ()
    lacking_usu: float = 0.0

    @property
    def price_su(self) -> float:
        """What the request counts in service units, by how scarce they are."""
        return (self.expected_charge_usu * self.pressure + self.lacking_usu) / 1e6

    @property
    def pressure(self) -> float:
        """What a service unit counts here, relative to one that is neither scarce nor idle."""
        if self.burn_usu_per_day is None or self.days_left is None:
            return self.scarcity
        needed_usu = self.burn_usu_per_day * self.days_left
        return min(MAX_SCARCITY, max(MIN_SCARCITY, needed_usu / max(1, self.available_usu)))

    def closed_at(self, now: float) -> Closure | None:
        """Return the maintenance that is going on, if any is."""
        return next((one for one in self.closures if one.begins_s <= now < one.ends_s), None)

    def closes_in_s(self, now: float) -> float:
        """Return the seconds until the next maintenance begins; infinite if none is planned."""
        return next((one.begins_s - now for one in self.closures if one.begins_s > now), math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What ``select`` must know besides the request and the replicas.

    ``held_usu`` is what the request already holds of ``held_allocation``; ``tried`` are instances
    that failed it before. ``hidden`` are sites and digests of which the caller is told nothing.
    ``coming`` are replicas on their way, cold for as long as they need. ``now`` is by the state's
    clock; ``bandwidths_bytes_per_s``, from a site to others, and the ``lengths`` of answers are
    those that were observed. ``own`` are sites of the caller's own, and whether they keep the
    request; ``kept_by`` are those that do so now.
    """

    model: str
    digest: str
    offers: Mapping[str, Offer]
    remaining_s: float
    settings: BrokerSettings
    held_allocation: str | None = None
    held_usu: int = 0
    tried: frozenset[str] = frozenset()
    now: float = 0.0
    bandwidths_bytes_per_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lengths: Lengths | None = None
    hidden: frozenset[str] = frozenset()
    coming: tuple[ReplicaSnapshot, ...] = ()
    own: Mapping[str, bool] = field(default_factory=dict)
    kept_by: tuple[str, ...] = ()

    def keeps_from(self, site: str) -> bool:
        """Return whether the caller's own instances keep the request from a site."""
        return bool(self.kept_by) and site not in self.own

    def tells(self, replica: ReplicaSnapshot) -> bool:
        """Return whether the caller may know of a replica."""
        return replica.site not in self.hidden and replica.digest not in self.hidden
