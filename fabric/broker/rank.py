"""The cost of all replicas at once, and the least of them: ``fabric.broker.cost`` in vectors.

Shapes: N rows (replicas), G groups (a model version at a site), K rows that tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b

import numpy as np

from fabric.broker.cost import (
    FAILURE_S,
    TRIED_S,
    barred_site,
    data_s,
    expected_tokens,
    full_site,
    known_length,
    lasting,
    passing,
    prefix_key,
    rates_from,
    saved_s,
    seconds_per_su,
    times_s,
)
from fabric.broker.facts import Context
from fabric.broker.offers import as_offers
from fabric.broker.policies import get_weights
from fabric.broker.pool import Floats, Pool
from fabric.messages import Request

EXPLORE_FACTOR = 2.0
EXPLORE_MARGIN_S = 1.0
"""Trying out may cost so much: a multiple of the best, and a second."""


class Ranking:
    """What each replica of a pool costs one request; infinite where it cannot go.

    The filters that rarely exclude anything (mode, context, choices, deadline, end of the block)
    are looked at for the winner first, and for all only if it fails them.
    """

    def __init__(self, request: Request, pool: Pool, context: Context) -> None:
        self._request = request
        self._pool = pool
        self._context = context
        self.affine = self._affine_rows()
        self.cost_N = self._cost()

    def best(self) -> int | None:
        """Return the row of the best replica, or ``None`` if every one is excluded.

        Replicas that cost the same within ``tie_s`` are told apart by how few requests they have
        in flight, and then by a hash of the request's id, so that equal requests spread.
        """
        if not len(self._pool):
            return None
        settings = self._context.settings
        row = self._least(settings.tie_s)
        if row is not None and self._excluded(row):
            self._filter()
            while (row := self._least(settings.tie_s)) is not None and self._excluded(row):
                self.cost_N[row] = math.inf
        return row

    def explored(self, best: int) -> int:
        """Return another row for the few requests that try one out, else ``best``.

        A function of the request's id. A trial moves no data, costs little more than the best, is
        expected to be done in half the time that is left, and never follows a failure.
        """
        request, context, settings = self._request, self._context, self._context.settings
        if request.policy == "local-only" or context.tried:
            return best
        drawn = _drawn(request.id)
        if (drawn >> 40 & 0xFFFFF) >= settings.explore * 2**20:
            return best
        limit_s = self.cost_N[best] * EXPLORE_FACTOR + EXPLORE_MARGIN_S
        rows_K = (self.cost_N <= limit_s).nonzero()[0]
        for row in rows_K[self._pool.draw(rows_K, drawn).argsort()].tolist():
            snapshot = self._pool.at(row)
            moves = data_s(request, snapshot.site, context) > 0
            late = times_s(request, snapshot, context.lengths).total_s > context.remaining_s / 2
            if not (moves or late or self._excluded(row)):
                return int(row)
        return best

    def _cost(self) -> Floats:
        """Return the weighted cost of each row; shape (N,)."""
        pool, request, context = self._pool, self._request, self._context
        weights = get_weights(request)
        prompt_tokens, output_tokens = expected_tokens(request, context.lengths)
        own_N = pool.column("prefill_s") * prompt_tokens
        own_N += pool.column("overhead_s")
        own_N += pool.column("decode_s") * output_tokens
        cost_N = self._load() * weights["queue"]
        cost_N += weights["service"]
        cost_N *= own_N
        worth_s = seconds_per_su((prompt_tokens, output_tokens), context)
        cost_N += self._site_costs(weights, worth_s).take(pool.group_N)
        if pool.has_failures:
            cost_N += pool.column("failures") * (weights["risk"] * FAILURE_S)
        if pool.has_cold:
            cost_N += pool.column("cold_s") * weights["queue"]
        if pool.has_blocked:
            cost_N += pool.column("blocked_s")
        for instance in context.tried:
            if (row := pool.row(instance)) is not None:
                cost_N[row] += weights["risk"] * TRIED_S
        for row in self.affine:
            cost_N[row] -= weights["service"] * saved_s(pool.snapshots[row], context.settings)
        return cost_N

    def _site_costs(self, weights: Mapping[str, float], worth_s: float) -> Floats:
        """Return what data and price cost at the site of each group, infinite where it does not
        offer to serve; a service unit is worth so many seconds. Shape (G,)."""
        pool, request, context = self._pool, self._request, self._context
        columns = as_offers(context.offers).columns
        cost_S = columns.price_su_S * (weights["price"] * worth_s)
        if request.data_site is not None:
            rates_S = np.array(rates_from(request.data_site, columns.sites, context))
            moving_S = request.data_bytes / rates_S + context.settings.locality_penalty_s
            if request.data_site in context.offers:
                moving_S[columns.sites.index(request.data_site)] = 0.0
            cost_S += weights["data"] * moving_S
        chooses = bool(request.sites is not None or context.kept_by)
        chooses |= request.policy == "local-only"
        for number in range(len(cost_S)) if chooses else columns.odd:
            site = columns.sites[number]
            is_full = full_site(site, pool.in_flight_of[site], context) is not None
            if is_full or barred_site(request, site, context) is not None:
                cost_S[number] = math.inf
        # What is offered where no replica is goes to a last group that none is in.
        site_G = np.full(pool.num_groups + 1, math.inf)
        site_G[pool.groups_at(context.digest, columns.sites)] = cost_S
        return site_G

    def _load(self) -> Floats:
        """Return the share of its own seconds that the request loses to others; shape (N,)."""
        if self._request.sampling.n == 1:
            return self._pool.column("load")
        return self._wait() + self._pool.column("share")

    def _wait(self) -> Floats:
        """Return the share of its own seconds that the request waits for rows; shape (N,)."""
        n, pool = self._request.sampling.n, self._pool
        if n == 1:
            return pool.column("wait")
        max_rows_N = pool.column("max_rows")
        return np.maximum(pool.column("num_busy") + n - max_rows_N, 0.0) / max_rows_N

    def _affine_rows(self) -> list[int]:
        pool, settings = self._pool, self._context.settings
        if not pool.has_prefixes or not pool.groups.get(self._context.digest):
            return []
        if self._request.mode != "query":  # every token of it, or of what it reads, is computed
            return []
        # An adapter is loaded where it was used before: that is worth a few tokens too.
        is_short = expected_tokens(self._request)[0] < settings.prefix_tokens
        if is_short and self._request.adapter is None:
            return []
        key = prefix_key(self._request, self._context.digest, settings.prefix_tokens)
        rows = pool.affine(self._context.digest, key, settings.prefix_replicas)
        return [row for row in rows if pool.snapshots[row].caches_prefixes]

    def _least(self, tie_s: float) -> int | None:
        row = int(self.cost_N.argmin())
        least_s = self.cost_N[row]
        if least_s == math.inf:
            return None
        rows_K = (self.cost_N <= least_s + tie_s).nonzero()[0]
        if len(rows_K) == 1:
            return row
        flights_K = self._pool.column("num_in_flight")[rows_K]
        rows_K = rows_K[flights_K == flights_K[flights_K.argmin()]]
        if len(rows_K) == 1:
            return int(rows_K[0])
        return int(rows_K[self._pool.draw(rows_K, _drawn(self._request.id)).argmin()])

    def _excluded(self, row: int) -> bool:
        pool, snapshot = self._pool, self._pool.snapshots[row]
        ends_in_s = pool.ends_in_s(row)
        barred = lasting(self._request, snapshot, self._context, ends_in_s=ends_in_s)
        # A full site's rows are infinite already.
        return barred is not None or passing(snapshot) is not None

    def _filter(self) -> None:
        """Exclude all that the rare filters exclude."""
        pool, request = self._pool, self._request
        prompt_tokens, output_tokens = expected_tokens(request, self._context.lengths)
        first_N = pool.column("prefill_s") * prompt_tokens + pool.column("overhead_s")
        own_N = first_N + pool.column("decode_s") * output_tokens
        first_N += self._wait() * own_N + pool.column("cold_s")
        total_N = own_N * (1.0 + self._load()) + pool.column("cold_s")
        barred_N = first_N > self._context.remaining_s
        barred_N |= total_N > pool.column("ends_at") - pool.now
        barred_N |= pool.column("max_rows") < request.sampling.n
        barred_N |= np.array([request.mode not in one.modes for one in pool.snapshots], bool)
        if request.adapter is not None:
            barred_N |= np.array([not one.adapters for one in pool.snapshots], bool)
        barred_N |= total_N > self._closes_in_s()
        if (length := known_length(request)) is not None:
            barred_N |= pool.column("context_tokens") < length
        self.cost_N[barred_N] = math.inf

    def _closes_in_s(self) -> Floats:
        """Return the seconds until each replica's site goes into maintenance; shape (N,)."""
        pool, context = self._pool, self._context
        site_G = [math.inf] * pool.num_groups
        for site, group in pool.groups.get(context.digest, {}).items():
            if (offer := context.offers.get(site)) is not None:
                site_G[group] = offer.closes_in_s(context.now)
        return np.array(site_G).take(pool.group_N)


def _drawn(request_id: str) -> int:
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest())
