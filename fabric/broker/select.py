"""Where a request runs: a pure function of the request, the replicas and the project's means.

Filters come first. What is left costs seconds: waiting and sharing (``queue``), computing
(``service``), starting (``cold``), moving data (``data``), service units turned into seconds by how
scarce they are (``price``) and what recent failures make likely (``risk``). A policy is a weight
for each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fabric.broker.cost import (
    HELD_UP,
    cost_s,
    expected_tokens,
    full_site,
    lasting,
    passing,
    saved_s,
    times_s,
)
from fabric.broker.facts import MAX_SCARCITY, Closure, Context, Offer, ReplicaSnapshot
from fabric.broker.pool import Pool, Replicas, as_pool
from fabric.broker.rank import Ranking
from fabric.errors import NoReplica
from fabric.messages import Candidate, Placement, Request

__all__ = [
    "MAX_SCARCITY",
    "Closure",
    "Context",
    "Decision",
    "Offer",
    "ReplicaSnapshot",
    "decide",
    "expected_tokens",
    "may_come",
    "select",
]

_ADVANTAGES = {
    "queue": "it is less busy",
    "service": "it is faster",
    "cold": "it is running",
    "data": "data is there",
    "price": "the balance is less scarce there",
    "risk": "it failed less of late",
}


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A choice, and what its table is made from as long as the pool is as it was."""

    request: Request
    pool: Pool
    context: Context
    row: int
    ranking: Ranking
    is_trial: bool = False
    full: str | None = None
    """The replica that would have been better, had it a row free."""

    @property
    def chosen(self) -> ReplicaSnapshot:
        """The replica."""
        return self.pool.at(self.row)

    def awaited(self, waited_s: float = 0.0) -> ReplicaSnapshot | None:
        """Return the replica on its way that is worth more than the chosen one, if any is.

        What the request has waited counts too, so that it does not wait for ever for one that
        falls behind again and again; it is done in half the time that is left.
        """
        request, context = self.request, self.context
        costs = {
            sum(cost_s(request, _later(one, waited_s), context).values()): one
            for one in context.coming
            if lasting(request, one, context) is None
            and times_s(request, one, context.lengths).total_s <= context.remaining_s / 2
        }
        least_s = min(costs, default=math.inf)
        return costs[least_s] if least_s < self.ranking.cost_N[self.row] else None

    def outlook(self) -> Placement:
        """Return the placement with its whole table, or what is waited for instead."""
        placement, awaited = self.placement(whole=True), self.awaited()
        if awaited is None:
            return placement
        reason = (
            f"{awaited.site}: {awaited.instance} is on its way and ready in about"
            f" {awaited.cold_s:.0f} s, which is worth waiting for"
        )
        changes = {"site": awaited.site, "instance": awaited.instance, "reason": reason}
        return placement.model_copy(update=changes)

    def bare(self) -> Placement:
        """Return the placement without its table."""
        return self._placement("chosen; the table is made when it is sent", ())

    def placement(self, *, whole: bool = False) -> Placement:
        """Return the placement with its table: all replicas, or of a large fleet the chosen one,
        the best of each site and what keeps others away, if not the ``whole`` is asked for."""
        lines = _Table(self.request, self.pool, self.context, self.ranking)
        short = not whole and len(self.pool) > self.context.settings.max_table
        candidates = [*(lines.short(self.row) if short else lines.whole()), *lines.coming()]
        chosen = next(one for one in candidates if one.instance == self.chosen.instance)
        reason = _reason(chosen, candidates)
        if self.is_trial:
            reason = f"{chosen.site}: it is tried out, to know how fast it is"
        elif self.full is not None:
            reason = f"{chosen.site}: it has a row free, and {self.full} has none"
        return self._placement(reason, tuple(candidates))

    def _placement(self, reason: str, candidates: tuple[Candidate, ...]) -> Placement:
        chosen = self.pool.snapshots[self.row]
        return Placement(
            site=chosen.site,
            instance=chosen.instance,
            digest=chosen.digest,
            reason=reason,
            candidates=candidates,
        )


def decide(request: Request, replicas: Replicas, context: Context) -> Decision:
    """Return the best replica for the request; its table is made when it is asked for.

    Raises:
        NoReplica: Every replica was excluded; the error says why, by instance.
    """
    pool = as_pool(replicas)
    ranking = Ranking(request, pool, context)
    best = ranking.best()
    if best is None:
        lines = _Table(request, pool, context, ranking)
        raise NoReplica(model=context.model, reasons=lines.reasons())
    row = ranking.explored(best)
    return Decision(request, pool, context, row, ranking, is_trial=row != best)


def select(request: Request, replicas: Replicas, context: Context) -> Placement:
    """Return the best replica for the request, with the table of candidates.

    Raises:
        NoReplica: Every replica was excluded; the error says why, by instance.
    """
    return decide(request, replicas, context).placement()


def full_sites(pool: Pool, context: Context) -> list[str]:
    """Return the sites that have as many requests in flight as they may."""
    sites = pool.groups.get(context.digest, {})
    return [site for site in sites if full_site(site, pool.in_flight_of[site], context)]


def may_come(request: Request, replicas: Replicas, context: Context) -> bool:
    """Return whether a replica is kept from the request only by what may pass."""
    pool = as_pool(replicas)
    kept_N = pool.column("blocked_s") > 0
    for site in full_sites(pool, context):
        kept_N[pool.rows(pool.groups[context.digest][site])] = True
    kept = kept_N.nonzero()[0].tolist()
    return any(lasting(request, pool.at(row), context) is None for row in kept)


class _Table:
    """Lines about the replicas of a pool, for one request."""

    def __init__(self, request: Request, pool: Pool, context: Context, ranking: Ranking) -> None:
        self._request = request
        self._pool = pool
        self._context = context
        self._ranking = ranking

    def whole(self) -> Iterator[Candidate]:
        """A line for each replica that the caller may know of."""
        rows = range(len(self._pool))
        return (self._line(row) for row in rows if self._context.tells(self._pool.snapshots[row]))

    def short(self, chosen: int) -> Iterator[Candidate]:
        """The chosen replica, the best of the best other sites, and a line for each reason that
        keeps replicas of a site away now."""
        pool, cost_N = self._pool, self._ranking.cost_N
        bests, away = {}, Counter[tuple[str, str | None]]()
        first: dict[tuple[str, str | None], int] = {}
        chosen_site = pool.snapshots[chosen].site
        for site, group in pool.groups[self._context.digest].items():
            if site in self._context.hidden:
                continue
            rows = pool.rows(group)
            if pool.has_blocked:
                is_blocked = pool.column("blocked_s")[rows] > 0
                for row in rows[is_blocked].tolist():
                    key = site, passing(pool.snapshots[row])
                    away[key] += 1
                    first.setdefault(key, row)
                rows = rows[~is_blocked]
            if len(rows):
                best = chosen if site == chosen_site else int(rows[cost_N[rows].argmin()])
                bests[best] = len(rows)
        limit = self._context.settings.max_table
        ranked = sorted(bests, key=lambda row: (row != chosen, float(cost_N[row])))
        for row in ranked[:limit]:
            yield self._line(row, num_alike=bests[row])
        for key, number in away.most_common(limit):
            yield self._line(first[key], num_alike=number)

    def coming(self) -> Iterator[Candidate]:
        """A line for each replica on its way that the caller may know of."""
        for snapshot in filter(self._context.tells, self._context.coming):
            excluded = lasting(self._request, snapshot, self._context)
            yield self._candidate(snapshot, excluded, ready_in_s=snapshot.cold_s)

    def reasons(self) -> dict[str, str]:
        """Return why each replica is excluded; of many replicas, why so many of a site are."""
        lines = [(one.site, one.instance, one.excluded or "") for one in self.whole()]
        if len(lines) <= self._context.settings.max_table:
            return {instance: reason for _, instance, reason in lines}
        counted = Counter((site, reason) for site, _, reason in lines)
        first = {(site, reason): instance for site, instance, reason in reversed(lines)}
        most = counted.most_common(self._context.settings.max_table)
        return {f"{first[key]} and {number - 1} more at {key[0]}": key[1] for key, number in most}

    def _line(self, row: int, num_alike: int = 1) -> Candidate:
        snapshot, context = self._pool.snapshots[row], self._context
        ends_in_s = self._pool.ends_in_s(row)
        excluded = lasting(self._request, snapshot, context, ends_in_s=ends_in_s)
        excluded = excluded or passing(snapshot)
        if excluded is None:
            num_in_flight = self._pool.in_flight_of[snapshot.site]
            excluded = full_site(snapshot.site, num_in_flight, context)
        saved = saved_s(snapshot, context.settings) if row in self._ranking.affine else 0.0
        return self._candidate(snapshot, excluded, saved_s=saved, num_alike=num_alike)

    def _candidate(
        self,
        snapshot: ReplicaSnapshot,
        excluded: str | None,
        *,
        saved_s: float = 0.0,
        num_alike: int = 1,
        ready_in_s: float | None = None,
    ) -> Candidate:
        cost = {}
        if excluded is None:
            cost = cost_s(self._request, snapshot, self._context, saved_s=saved_s)
        return Candidate(
            site=snapshot.site,
            instance=snapshot.instance,
            digest=snapshot.digest,
            excluded=excluded,
            cost_s=cost,
            total_s=None if excluded else sum(cost.values()),
            correction=snapshot.correction,
            num_alike=num_alike,
            ready_in_s=ready_in_s,
        )


def _later(coming: ReplicaSnapshot, waited_s: float) -> ReplicaSnapshot:
    """Return a replica on its way as one that is ready after all seconds that it is waited for,
    each as dear as a second in line."""
    return replace(coming, start_wait_s=HELD_UP * (waited_s + coming.cold_s))


def _reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    others = [one for one in candidates if one is not chosen and one.total_s is not None]
    if not others:
        excluded = [f"{one.site}: {one.excluded}" for one in candidates if one.excluded]
        why = f" ({'; '.join(excluded)})" if excluded else ""
        return f"{chosen.site}: nothing else can serve it{why}"
    other = min(others, key=lambda one: (one.total_s or 0.0, one.instance))
    gains = {
        name: other.cost_s.get(name, 0.0) - chosen.cost_s.get(name, 0.0) for name in _ADVANTAGES
    }
    best = max(gains, key=lambda name: gains[name])
    why = _ADVANTAGES[best] if gains[best] > 0 else "it serves as well as any"
    where = other.site if other.site != chosen.site else other.instance
    return (
        f"{chosen.site}: {why}; it costs {chosen.total_s:.1f} s against {other.total_s:.1f} s"
        f" at {where}"
    )
