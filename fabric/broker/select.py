"""Where a request runs: a pure function of the request, the replicas and the project's means.

Filters come first. What is left costs seconds: waiting and sharing (``queue``), computing
(``service``), moving data (``data``), service units turned into seconds by how scarce they are
(``price``) and what recent failures make likely (``risk``). A policy is a weight for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fabric.broker.settings import BrokerSettings
from fabric.errors import NoReplica
from fabric.messages import Candidate, InstanceState, Placement, Request, TokensInput

PRIOR_PREFILL_TOKENS_PER_S = 2_000.0
PRIOR_DECODE_TOKENS_PER_S = 30.0
PRIOR_OUTPUT_TOKENS = 128
MIN_TOKENS_PER_S = 0.01
BYTES_PER_TOKEN = 4
FAILURE_S = 2.0
TRIED_S = 30.0
MAX_SCARCITY = 1_000.0

POLICIES: Mapping[str, Mapping[str, float]] = {
    "balanced": {"queue": 1.0, "service": 1.0, "data": 1.0, "price": 1.0, "risk": 1.0},
    "fastest": {"queue": 1.0, "service": 1.0, "data": 1.0, "price": 0.0, "risk": 1.0},
    "cheapest": {"queue": 0.05, "service": 0.05, "data": 0.05, "price": 20.0, "risk": 1.0},
    "local-only": {"queue": 1.0, "service": 1.0, "data": 1.0, "price": 1.0, "risk": 1.0},
}

_ADVANTAGES = {
    "queue": "it is less busy",
    "service": "it is faster",
    "data": "data is there",
    "price": "the balance is less scarce there",
    "risk": "it failed less of late",
}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What the request would cost at a site, and the allocation that would pay (``None``: none).

    ``available_usu`` is the allocation's free balance; ``scarcity`` compares it with all the
    project may spend (1: as good as everything).
    """

    site: str
    allocation: str | None
    available_usu: int
    max_charge_usu: int
    expected_charge_usu: int
    scarcity: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What ``select`` must know besides the request and the replicas.

    ``held_usu`` is what the request already holds of ``held_allocation``; ``tried`` are instances
    that failed it before.
    """

    model: str
    digest: str
    offers: Mapping[str, Offer]
    remaining_s: float
    settings: BrokerSettings
    held_allocation: str | None = None
    held_usu: int = 0
    tried: frozenset[str] = frozenset()


def select(request: Request, snapshots: Sequence[ReplicaSnapshot], context: Context) -> Placement:
    """Return the best replica for the request, with the whole table of candidates.

    Replicas that cost the same within ``tie_s`` are told apart by how few requests they have in
    flight, and then by a hash of the request's id, so that equal requests spread.

    Raises:
        NoReplica: Every replica was excluded; the error says why, by instance.
    """
    candidates = [_candidate(request, snapshot, context) for snapshot in snapshots]
    totals = {
        index: candidate.total_s
        for index, candidate in enumerate(candidates)
        if candidate.total_s is not None
    }
    if not totals:
        reasons = {one.instance: one.excluded or "" for one in candidates}
        raise NoReplica(model=context.model, reasons=reasons)
    limit_s = min(totals.values()) + context.settings.tie_s
    best = min(
        (index for index, total_s in totals.items() if total_s <= limit_s),
        key=lambda index: (
            snapshots[index].num_in_flight,
            _spread(request.id, snapshots[index].instance),
        ),
    )
    chosen = candidates[best]
    return Placement(
        site=chosen.site,
        instance=chosen.instance,
        digest=chosen.digest,
        reason=_reason(chosen, candidates),
        candidates=tuple(candidates),
    )


def may_come(request: Request, snapshots: Iterable[ReplicaSnapshot], context: Context) -> bool:
    """Return whether a replica is kept from the request only by what may pass."""
    return any(
        _passing(snapshot) is not None and _lasting(request, snapshot, context) is None
        for snapshot in snapshots
    )


def expected_tokens(request: Request) -> tuple[int, int]:
    """Return the likely number of prompt tokens and of output tokens of one choice."""
    prompt = request.prompt_tokens_bound()
    if not isinstance(request.input, TokensInput):
        prompt = prompt // BYTES_PER_TOKEN + 1
    wanted = request.sampling.max_tokens
    return prompt, PRIOR_OUTPUT_TOKENS if wanted is None else min(wanted, PRIOR_OUTPUT_TOKENS)


def _candidate(request: Request, snapshot: ReplicaSnapshot, context: Context) -> Candidate:
    excluded = _lasting(request, snapshot, context) or _passing(snapshot)
    cost_s = {} if excluded else _cost_s(request, snapshot, context)
    return Candidate(
        site=snapshot.site,
        instance=snapshot.instance,
        digest=snapshot.digest,
        excluded=excluded,
        cost_s=cost_s,
        total_s=None if excluded else sum(cost_s.values()),
    )


def _lasting(request: Request, snapshot: ReplicaSnapshot, context: Context) -> str | None:
    """Return what keeps the replica from ever serving the request, if anything does."""
    site = snapshot.site
    if snapshot.digest != context.digest:
        return "it serves another model version"
    if request.sites is not None and site not in request.sites:
        return f"the request may run only at {', '.join(request.sites)}"
    if request.policy == "local-only" and site != request.data_site:
        return f"its data may not leave {request.data_site}"
    if request.sampling.n > snapshot.max_rows:
        return f"{request.sampling.n} choices are asked for and it runs {snapshot.max_rows} rows"
    if (length := _known_length(request)) is not None and length > snapshot.context_tokens:
        return f"its context is {snapshot.context_tokens} tokens and {length} are needed"
    if (broke := _unaffordable(site, context)) is not None:
        return broke
    return _too_late(request, snapshot, context)


def _known_length(request: Request) -> int | None:
    """Return prompt and output in tokens; text is counted by the instance, which then says so."""
    if not isinstance(request.input, TokensInput):
        return None
    return len(request.input.ids) + (request.sampling.max_tokens or 0)


def _unaffordable(site: str, context: Context) -> str | None:
    offer = context.offers.get(site)
    if offer is None:
        return f"{site} takes no requests: it is disabled, or no price is set there"
    if offer.allocation is None:
        return f"the project has no allocation for {site}"
    held_usu = context.held_usu if offer.allocation == context.held_allocation else 0
    available_usu = offer.available_usu + held_usu
    if available_usu < offer.max_charge_usu:
        return (
            f"the allocation {offer.allocation!r} has {available_usu} micro-SU available and up to"
            f" {offer.max_charge_usu} may be needed"
        )
    return None


def _too_late(request: Request, snapshot: ReplicaSnapshot, context: Context) -> str | None:
    """Refuse what is hopeless: the length of the output is a guess, the first token is not."""
    times = _times(request, snapshot)
    first_s = times.wait_s + times.first_s
    if first_s > context.remaining_s:
        return (
            f"its first token is expected in {first_s:.1f} s and the deadline is in"
            f" {context.remaining_s:.1f} s"
        )
    total_s = times.queue_s + times.first_s + times.rest_s
    if snapshot.ends_in_s is not None and total_s > snapshot.ends_in_s:
        return f"its block ends in {snapshot.ends_in_s:.0f} s"
    return None


def _passing(snapshot: ReplicaSnapshot) -> str | None:
    """Return what keeps the replica from serving now, if anything does."""
    if snapshot.state is InstanceState.LOST:
        return "its session was lost and may come back"
    if snapshot.state is not InstanceState.READY:
        return f"it is {snapshot.state.value}"
    if snapshot.ejected:
        return "it is out after failures in a row"
    return None


def _cost_s(request: Request, snapshot: ReplicaSnapshot, context: Context) -> dict[str, float]:
    settings, offer = context.settings, context.offers[snapshot.site]
    times = _times(request, snapshot)
    data_s = 0.0
    if request.data_site not in (None, snapshot.site):
        data_s = settings.locality_penalty_s + request.data_bytes / settings.bandwidth_bytes_per_s
    cost_s = {
        "queue": times.queue_s,
        "service": times.first_s + times.rest_s,
        "data": data_s,
        "price": offer.expected_charge_usu / 1e6 * settings.seconds_per_su * offer.scarcity,
        "risk": FAILURE_S * snapshot.failures
        + (TRIED_S if snapshot.instance in context.tried else 0.0),
    }
    weights = POLICIES[request.policy]
    return {name: round(weights[name] * seconds, 6) for name, seconds in cost_s.items()}


@dataclass(frozen=True, slots=True)
class _Times:
    """Expected seconds of waiting for a row, until the first token, and from it to the last."""

    wait_s: float
    first_s: float
    rest_s: float
    share: float

    @property
    def queue_s(self) -> float:
        return self.wait_s + self.share * (self.first_s + self.rest_s)


def _times(request: Request, snapshot: ReplicaSnapshot) -> _Times:
    """Rows share the engine, so each busy one slows the others; beyond ``max_rows`` they wait."""
    prompt_tokens, output_tokens = expected_tokens(request)
    prefill_tokens_per_s = snapshot.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
    decode_tokens_per_s = snapshot.decode_tokens_per_s or PRIOR_DECODE_TOKENS_PER_S
    first_s = snapshot.overhead_s + prompt_tokens / max(MIN_TOKENS_PER_S, prefill_tokens_per_s)
    rest_s = output_tokens / max(MIN_TOKENS_PER_S, decode_tokens_per_s)
    num_waiting = max(0, snapshot.num_busy + request.sampling.n - snapshot.max_rows)
    return _Times(
        wait_s=(first_s + rest_s) * num_waiting / snapshot.max_rows,
        first_s=first_s,
        rest_s=rest_s,
        share=min(snapshot.num_busy, snapshot.max_rows) / snapshot.max_rows,
    )


def _spread(request_id: str, instance: str) -> bytes:
    return blake2b(f"{request_id}/{instance}".encode(), digest_size=8).digest()


def _reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    others = [one for one in candidates if one is not chosen and one.total_s is not None]
    if not others:
        excluded = [f"{one.site}: {one.excluded}" for one in candidates if one.excluded]
        why = f" ({'; '.join(excluded)})" if excluded else ""
        return f"{chosen.site}: nothing else can serve it{why}"
    other = min(others, key=lambda one: (one.total_s or 0.0, one.instance))
    gains = {name: other.cost_s[name] - chosen.cost_s[name] for name in _ADVANTAGES}
    best = max(gains, key=lambda name: gains[name])
    why = _ADVANTAGES[best] if gains[best] > 0 else "it serves as well as any"
    where = other.site if other.site != chosen.site else other.instance
    return (
        f"{chosen.site}: {why}; it costs {chosen.total_s:.1f} s against {other.total_s:.1f} s"
        f" at {where}"
    )
