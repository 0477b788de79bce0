"""The line: runs that wait at the hub for a row, in fair order, and what that waiting will be.

A replica gets few more attempts than it has rows, so that who goes next is decided here, when a row
is free, and not by who came first. Batch work takes rows only where others leave enough of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from fabric.broker.cost import HELD_UP, times_s
from fabric.broker.facts import Context, ReplicaSnapshot
from fabric.broker.fair import FairQueue, Waiter
from fabric.broker.lengths import Lengths
from fabric.broker.policies import get_weights
from fabric.broker.pool import Floats, Pool, Replicas, Rows
from fabric.broker.progress import Progress
from fabric.broker.replicas import Fleet
from fabric.broker.select import Decision
from fabric.broker.settings import BrokerSettings
from fabric.broker.tiers import PROMISES, Promise, Tier, tier_of
from fabric.broker.usual import SMOOTHING
from fabric.errors import NoReplica, Overloaded, TierNotHeld
from fabric.messages import Request, Usage

_Decide = Callable[[Request, Replicas, Context], Decision]

BUSY = 2.0
"""How much longer a row of a full batch is expected to take than one alone (see ``times_s``)."""
MAX_RETRY_AFTER_S = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What waits of one project, tier and model; ``seconds`` of rows it is expected to take."""

    model: str
    project: str
    tier: Tier
    num_waiting: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn that was taken, and the device-seconds it was charged."""

    digest: str
    waiter: Waiter
    charged_s: float


@dataclass(frozen=True, slots=True)
class _Expected:
    """A request that is being admitted: its row-seconds, and where it would have gone when the
    fleet had changed so often."""

    digest: str
    row_s: float
    decision: Decision
    changes: int


class Line:
    """All runs that wait for a row, by the version they wait for.

    Args:
        settings: How much may wait, and how rows are shared.
        fleet: Who has rows.
    """

    def __init__(self, settings: BrokerSettings, fleet: Fleet) -> None:
        self._settings = settings
        self._fleet = fleet
        self._queues: dict[str, FairQueue] = {}
        self._models: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        """The version that each run waits for."""
        self._expected: dict[str, _Expected] = {}
        """The requests that are being admitted."""
        self._num_expected: Counter[str] = Counter()
        """How many they are, by version."""
        self._turns: dict[str, _Turn] = {}
        self._scales: dict[str, float] = {}
        """Measured device-seconds a predicted row-second, by version."""
        self._programs: dict[str, set[str]] = {}
        self._placeable_at: dict[str, dict[Hashable, float]] = {}
        """When a replica was last seen that could take the first of a place, had it room."""
        self._freed: set[str] = set()
        self.promises: Mapping[Tier, Promise] = PROMISES
        """As administrators have them."""

    # ---- who waits ------------------------------------------------------------------------------

    def join(self, run: Progress) -> bool:
        """Take in a run that has been admitted; return whether it may go at once if there is room:
        nobody stands in its place before it."""
        ticket, request = run.ticket, run.ticket.request
        expected = self._expected.get(request.id)
        self.forget(request.id)
        if not self._settings.fair:
            return True
        digest = ticket.digest
        queue = self._queues.setdefault(digest, FairQueue())
        self._models[digest] = ticket.model
        self._digests[request.id] = digest
        run.in_line = True
        seconds = expected.row_s if expected else self._row_s(request, self._fleet.any_of(digest))
        return queue.add(self._waiter_of(run, seconds))

    def leave(self, run: Progress) -> None:
        """A run waits no longer, because it has ended."""
        if run.in_line:
            run_id = run.ticket.request.id
            self._queues[self._digests[run_id]].drop(run_id)
            self._left(run)

    def turns(self, *, everyone: bool) -> Iterator[str]:
        """Yield the runs whose turn it may be, the next first; each is tried before another.

        Args:
            everyone: Whether to ask the first of every place; otherwise only as long as there is
                room where something has just ended.
        """
        freed, self._freed = self._freed, set()
        digests = list(self._queues) if everyone else self._fleet.digests_of(freed)
        for digest in digests:
            queue, skipped = self._queues.get(digest), set[Hashable]()
            while queue and (head := queue.head(skipped)) is not None:
                if not everyone and not any(map(self._fleet.has_room, freed)):
                    break
                yield head.item
                if head.item in queue:
                    skipped.add(head.place)

    @property
    def has_freed(self) -> bool:
        """Whether a row was freed that nobody was asked about, though somebody waits."""
        return bool(self._freed)

    def freed(self, instance: str, run_id: str) -> None:
        """An attempt of a run is over there."""
        if self._digests:
            self._freed.add(instance)
        if (programs := self._programs.get(instance)) is not None:
            programs.discard(run_id)
            if not programs:
                del self._programs[instance]

    def waits_since(self, run: Progress) -> float:
        """Return since when no replica could have taken a run, even a full one."""
        if not run.in_line:
            return run.waiting_since
        digest = self._digests[run.ticket.request.id]
        place = self._waiter_of(run).place
        return max(run.waiting_since, self._placeable_at.get(digest, {}).get(place, -np.inf))

    def waiting(self) -> list[Waiting]:
        """Return what waits, of whom and for what."""
        seconds: defaultdict[tuple[str, str, Tier], list[float]] = defaultdict(list)
        for digest, queue in self._queues.items():
            for one in queue:
                seconds[self._models[digest], one.project, one.tier].append(one.seconds)
        return [
            Waiting(model=m, project=p, tier=t, num_waiting=len(all_s), seconds=sum(all_s))
            for (m, p, t), all_s in sorted(seconds.items())
        ]

    def keeping_promises(self, decide: _Decide) -> _Decide:
        """Return a way to choose that first looks where a tier's first token is expected in
        time."""

        def decide_so(request: Request, replicas: Replicas, context: Context) -> Decision:
            admit_s = self.promises[tier_of(request)].admit_s
            if admit_s is not None and admit_s < context.remaining_s and not context.tried:
                with suppress(NoReplica):
                    return decide(request, replicas, replace(context, remaining_s=admit_s))
            return decide(request, replicas, context)

        return decide_so

    # ---- turns ----------------------------------------------------------------------------------

    def turn(self, run: Progress, decision: Decision, now: float) -> Decision | None:
        """Return where a run in line goes now, or ``None`` if it waits for a row.

        A full replica is worth waiting for only as long as nothing free costs less than that wait,
        and so is one that is on its way.
        """
        request, digest = run.ticket.request, run.ticket.digest
        waiter = self._waiter_of(run)
        is_full = self._room_of(request, decision.chosen) <= 0
        turn = self._elsewhere(request, decision) if is_full else decision
        if turn is None or turn.awaited(now - run.waiting_since) is not None:
            self._placeable_at.setdefault(digest, {})[waiter.place] = now
            return None
        row_s = self._row_s(request, turn.chosen, turn.context.lengths)
        charged_s = row_s * self._scales.get(digest, 1.0)
        self._queues[digest].take(request.id, charged_s)
        self._left(run)
        self._turns[request.id] = _Turn(digest, replace(waiter, seconds=row_s), charged_s)
        return turn

    def began(self, run: Progress) -> None:
        """An attempt of a run goes to a replica."""
        if run.ticket.request.mode == "program" and run.instance is not None:
            self._programs.setdefault(run.instance, set()).add(run.ticket.request.id)

    def ended(self, run: Progress, usage: Usage, total_s: float) -> None:
        """A run is over: its turn is charged what it took, and nothing if no answer came of it.

        Args:
            run: The run.
            usage: What it consumed; device-seconds beyond its rows' own time are not believed.
            total_s: Seconds since it came in.
        """
        self.leave(run)
        turn = self._turns.pop(run.ticket.request.id, None)
        if turn is None:
            return
        if not run.delivered and run.cancel_until is None:
            self._queues[turn.digest].correct(turn.waiter, -turn.charged_s)
            return
        if usage.device_s <= 0:  # the instance does not say
            return
        measured_s = min(usage.device_s, total_s * run.ticket.request.sampling.n)
        self._queues[turn.digest].correct(turn.waiter, measured_s - turn.charged_s)
        scale = self._scales.get(turn.digest)
        ratio = measured_s / max(1e-9, turn.waiter.seconds)
        self._scales[turn.digest] = ratio if scale is None else scale + SMOOTHING * (ratio - scale)

    # ---- what waiting will be -------------------------------------------------------------------

    def foresee(
        self, now: float, request: Request, project: str, context: Context, decision: Decision
    ) -> None:
        """Expect a request that is being admitted, if it can be answered in time.

        Only what waiting costs is held against it, and only by measured rates.

        Raises:
            Overloaded: It is predicted to miss its tier's promise or its own deadline.
            TierNotHeld: It would miss its tier's promise even if nobody else was there.
        """
        self.forget(request.id)
        if not self._settings.fair:
            return
        chosen, digest = decision.chosen, context.digest
        row_s, tier = self._row_s(request, chosen, context.lengths), tier_of(request)
        own, deadline_at = tuple(context.own) if context.kept_by else (), now + context.remaining_s
        mine = self._waiter(request, project, own, row_s, deadline_at)
        wait_s = self._wait_s(request, mine, decision)
        times = times_s(request, chosen, context.lengths)
        work_s, admit_s = times.first_s + times.rest_s, self.promises[tier].admit_s
        limits = [("end", times.cold_s + work_s, times.share * work_s, context.remaining_s)]
        if admit_s is not None and not times.cold_s:  # what is promised holds for warm replicas
            limits.insert(0, ("first token", times.first_s, times.share * times.first_s, admit_s))
        if chosen.overhead_s or chosen.prefill_tokens_per_s or chosen.decode_tokens_per_s:
            for what, alone_s, shared_s, limit_s in limits:
                if what == "first token" and alone_s > limit_s:
                    raise TierNotHeld(tier=tier, predicted_s=alone_s, limit_s=limit_s)
                predicted_s = alone_s + shared_s + wait_s
                if wait_s and alone_s <= limit_s < predicted_s:
                    raise self._overloaded(context, tier, what, predicted_s, limit_s)
        queue = self._queues.get(digest, ())
        if wait_s and len(queue) + self._num_expected[digest] >= self._settings.max_waiting:
            raise self._overloaded(context, tier, "end", work_s + wait_s, context.remaining_s)
        self._expected[request.id] = _Expected(digest, row_s, decision, self._fleet.changes)
        self._num_expected[digest] += 1

    def forget(self, request_id: str) -> None:
        """A request is not being admitted any more."""
        if (expected := self._expected.pop(request_id, None)) is not None:
            self._num_expected[expected.digest] -= 1

    def foreseen(self, run: Progress, now: float) -> Decision | None:
        """Return where a run that has just been admitted would go, if the fleet is as it was."""
        self._fleet.pool(now)  # It sees what time alone has changed.
        expected = self._expected.get(run.ticket.request.id)
        if expected is None or expected.changes != self._fleet.changes:
            return None
        return expected.decision

    def _left(self, run: Progress) -> None:
        run.in_line = False
        digest = self._digests.pop(run.ticket.request.id)
        if not self._queues[digest]:
            self._placeable_at.pop(digest, None)

    def _overloaded(
        self, context: Context, tier: Tier, what: str, predicted_s: float, limit_s: float
    ) -> Overloaded:
        retry_after_s = min(MAX_RETRY_AFTER_S, max(1.0, predicted_s - limit_s))
        return Overloaded(
            model=context.model,
            tier=tier,
            what=what,
            predicted_s=round(predicted_s, 1),
            limit_s=round(limit_s, 1),
            retry_after_s=float(np.ceil(retry_after_s)),
        )

    def _wait_s(self, request: Request, mine: Waiter, decision: Decision) -> float:
        """Return the seconds until a newcomer is expected to have its row."""
        digest, pool, row_s = decision.chosen.digest, decision.pool, mine.seconds
        num_before = self._num_expected[digest]
        rows_K = np.isfinite(decision.ranking.cost_N).nonzero()[0]
        num_free = np.maximum(0.0, self._room(request, pool)[rows_K]).sum()
        if self._room_of(request, decision.chosen) > 0 and num_before < num_free:
            return 0.0
        before_s = num_before * row_s
        if (queue := self._queues.get(digest)) is not None:
            before_s += queue.before_s(mine)
        before_s = max(0.0, before_s - num_free * row_s)
        return float(before_s + row_s) / self._num_rows(request, pool, rows_K)

    # ---- room -----------------------------------------------------------------------------------

    def _elsewhere(self, request: Request, decision: Decision) -> Decision | None:
        """Return the best replica that has room, if it costs less than the wait for the best."""
        pool, digest = decision.pool, decision.chosen.digest
        ranking, room_N = copy(decision.ranking), self._room(request, pool)
        ranking.cost_N = np.where(room_N > 0, ranking.cost_N, np.inf)
        row = ranking.best()
        if row is None:
            return None
        full_K = (np.isfinite(decision.ranking.cost_N) & (room_N <= 0)).nonzero()[0]
        num_full = self._num_rows(request, pool, full_K)
        wait_s = self._queues[digest].backlog_s / num_full
        best_s = (
            decision.ranking.cost_N[decision.row] + get_weights(request)["queue"] * HELD_UP * wait_s
        )
        if ranking.cost_N[row] > best_s:
            return None
        return replace(decision, row=row, full=decision.chosen.instance, is_trial=False)

    def _room_of(self, request: Request, snapshot: ReplicaSnapshot) -> float:
        """Return how many more attempts of this tier a replica may have."""
        tier = tier_of(request)
        room = int(self._part(tier) * snapshot.max_in_flight) or 1
        if tier == "introspection":
            used = len(self._programs.get(snapshot.instance, ()))
            return min(room - used, snapshot.max_in_flight - snapshot.num_in_flight)
        return room - snapshot.num_in_flight

    def _room(self, request: Request, pool: Pool) -> Floats:
        """Return the same for all replicas; shape (N,)."""
        tier, most_N = tier_of(request), pool.column("max_in_flight")
        part = 1.0 if tier == "introspection" else self._part(tier)
        room_N = np.maximum(1.0, np.floor(part * most_N)) - pool.column("num_in_flight")
        if tier == "introspection":
            for instance in self._programs:
                if (row := pool.row(instance)) is not None:
                    room_N[row] = self._room_of(request, pool.snapshots[row])
        return room_N

    def _part(self, tier: Tier) -> float:
        shares = {
            "batch": self._settings.batch_share,
            "introspection": self._settings.introspection_share,
        }
        return shares.get(tier, 1.0 + self._settings.rows_ahead)

    def _num_rows(self, request: Request, pool: Pool, rows_K: Rows) -> float:
        num_rows = pool.column("max_rows")[rows_K].sum()
        return max(1.0, float(num_rows) * min(1.0, self._part(tier_of(request))))

    def _row_s(
        self, request: Request, snapshot: ReplicaSnapshot | None, lengths: Lengths | None = None
    ) -> float:
        """Return the row-seconds a request is expected to take in a full batch."""
        if snapshot is None:
            return BUSY
        times = times_s(request, snapshot, lengths)
        return BUSY * (times.first_s + times.rest_s) * request.sampling.n

    def _waiter_of(self, run: Progress, seconds: float = 0.0) -> Waiter:
        ticket, own = run.ticket, tuple(run.own)
        return self._waiter(ticket.request, ticket.project, own, seconds, run.deadline_at)

    def _waiter(
        self,
        request: Request,
        project: str,
        own: tuple[str, ...],
        seconds: float,
        deadline_at: float,
    ) -> Waiter:
        tier = tier_of(request)
        local = request.data_site if request.policy == "local-only" else None
        # Of those that are kept, who has less time is free to leave before the others.
        kept = (own, request.deadline_s) if own else ()
        return Waiter(
            item=request.id,
            project=project,
            tier=tier,
            lane=(request.sites, local, request.mode, request.adapter is not None, kept),
            own=own or None,
            seconds=seconds,
            due_at=deadline_at,
            weight=self._settings.project_weights.get(project, 1.0),
            tier_weight=self.promises[tier].weight,
        )
