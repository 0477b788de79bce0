"""Estimates: what a big run would take and cost, by site, from the rates that were measured.

A site's replicas are taken to be full of this run alone, at the speed they had of late; a site's
quantiles are those of how its answers' times compared with what was predicted of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fabric.broker.cost import passing, times_s
from fabric.broker.facts import Context, ReplicaSnapshot
from fabric.broker.replicas import Fleet
from fabric.broker.tiers import Tier, tier_of
from fabric.messages import Request

QUANTILES = (0.1, 0.5, 0.9)
MIN_RATIOS = 8
"""So many answers must have been timed at a site before anything is said of their spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Seconds that are not exceeded with a probability of 10, 50 and 90%."""

    p10_s: float
    p50_s: float
    p90_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEstimate:
    """What the whole run would take at one site alone.

    Args:
        site: The site.
        num_replicas: Replicas that would work on it.
        num_rows: Requests they compute at once, for the tier.
        requests_per_s: That they answer, by the median.
        duration: Of the whole run; ``None`` where no replica is.
        is_measured: Whether that rests on answers of these replicas, or on priors.
        charge_usu: Micro-SU of the whole run, no prompt being cached.
        available_usu: What the project may spend there.
    """

    site: str
    num_replicas: int
    num_rows: int
    requests_per_s: float
    duration: Duration | None
    is_measured: bool
    charge_usu: int
    available_usu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would take: at each site alone, and at all of them together.

    ``charge_usu`` is what it costs where each site answers as many requests as it can meanwhile;
    ``duration`` is ``None`` where no replica is anywhere.
    """

    model: str
    tier: Tier
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    sites: Sequence[SiteEstimate]
    requests_per_s: float
    duration: Duration | None
    is_measured: bool
    charge_usu: int


def estimate(
    request: Request, num_requests: int, context: Context, fleet: Fleet, *, now: float
) -> Estimate:
    """Return what ``num_requests`` such requests would take.

    Args:
        request: One of them; its ``max_tokens`` is what each generates.
        num_requests: How many there are.
        context: What one of them costs at most, and what the project may spend, by site.
        fleet: The replicas.
        now: The fleet's time.
    """
    tier, output_tokens = tier_of(request), request.sampling.max_tokens or 0
    share = context.settings.batch_share if tier == "batch" else 1.0
    offers = {site: one for site, one in context.offers.items() if not context.keeps_from(site)}
    replicas = [one for one in fleet if one.hello.digest == context.digest]
    ratios = {one.hello.instance: one.ratios for one in replicas}
    ready: dict[str, list[ReplicaSnapshot]] = {site: [] for site in offers}
    for one in (replica.measured(now) for replica in replicas):
        if one.site in ready and passing(one) is None:
            ready[one.site].append(one)
    sites, rates = [], []
    for site, here in sorted(ready.items()):
        rates_Q = [
            sum(_rate(request, one, output_tokens, share, quantile, ratios) for one in here)
            for quantile in QUANTILES
        ]
        least_s = min((_alone_s(request, one, output_tokens) for one in here), default=0.0)
        rates.append((rates_Q, least_s))
        sites.append(
            SiteEstimate(
                site=site,
                num_replicas=len(here),
                num_rows=sum(_num_rows(one, share) for one in here),
                requests_per_s=rates_Q[1],
                duration=_duration(num_requests, rates_Q, least_s),
                is_measured=bool(here)
                and all(len(ratios.get(one.instance, ())) >= MIN_RATIOS for one in here),
                charge_usu=num_requests * offers[site].max_charge_usu,
                available_usu=offers[site].available_usu,
            )
        )
    all_Q = [sum(rates_Q[at] for rates_Q, _ in rates) for at in range(len(QUANTILES))]
    serving = [site for site in sites if site.requests_per_s > 0]
    per_s = all_Q[1] or 1.0
    parts = ((site.requests_per_s / per_s, site.charge_usu) for site in serving)
    return Estimate(
        model=context.model,
        tier=tier,
        num_requests=num_requests,
        prompt_tokens=request.prompt_tokens_bound(),
        output_tokens=output_tokens,
        sites=sites,
        requests_per_s=all_Q[1],
        duration=_duration(num_requests, all_Q, max((s for _, s in rates), default=0.0)),
        is_measured=bool(serving) and all(site.is_measured for site in serving),
        charge_usu=round(sum(part * charge_usu for part, charge_usu in parts)),
    )


def _rate(
    request: Request,
    replica: ReplicaSnapshot,
    output_tokens: int,
    share: float,
    quantile: float,
    ratios: Mapping[str, Sequence[float]],
) -> float:
    """Return the requests a second of a replica that is full of them."""
    rows = _num_rows(replica, share)
    full = replace(replica, num_busy=rows - 1, cold_p=0.0)
    seen = sorted(ratios.get(replica.instance, ()))
    if len(seen) >= MIN_RATIOS:
        full = replace(full, correction=seen[round(quantile * (len(seen) - 1))])
    return rows / max(1e-6, times_s(request, full, output_tokens=output_tokens).total_s)


def _alone_s(request: Request, replica: ReplicaSnapshot, output_tokens: int) -> float:
    """Return the seconds one request takes at a replica with nothing else to do."""
    return times_s(request, replace(replica, num_busy=0), output_tokens=output_tokens).total_s


def _num_rows(replica: ReplicaSnapshot, share: float) -> int:
    return max(1, int(share * replica.max_rows))


def _duration(num_requests: int, rates_Q: Sequence[float], least_s: float) -> Duration | None:
    """Return the seconds at three rates, of which the first is that of the shortest times."""
    if not all(rates_Q):
        return None
    fast_s, mid_s, slow_s = (max(least_s, num_requests / rate) for rate in rates_Q)
    return Duration(p10_s=fast_s, p50_s=mid_s, p90_s=slow_s)
