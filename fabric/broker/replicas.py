"""The fleet: what the broker knows of each instance, who has failed of late, and who is out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from fabric.broker.facts import NO_LIMIT, ReplicaSnapshot
from fabric.broker.pool import Pool
from fabric.broker.settings import BrokerSettings
from fabric.broker.usual import Rates, Usual, mean
from fabric.messages import Hello, InstanceState, Limits, Load

FAILURE_HALF_LIFE_S = 30.0
FRESH_S = 60.0
"""For how long observed rates count: an instance that once was slow gets another chance, as one
that does what is usual at its site."""
LONG_PROMPT_TOKENS = 256
"""From here on the first token's time says how fast prompts are read."""
CORRECTIONS = (0.25, 4.0)
"""Between these a replica's predictions are corrected."""
DECAY_STEP_S = 1.0
"""How exactly the decay of failures is followed."""
NUM_RATIOS = 64
"""Latest answers whose observed over predicted seconds are kept."""
NOTHING_USUAL = Usual()
FORGOTTEN = 0.01
"""So few recent failures are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica as others may see it.

    ``joined_at`` is seconds since the epoch (UTC); ``num_in_flight`` counts the attempts this hub
    has there now.
    """

    instance: str
    site: str
    model: str
    digest: str
    state: InstanceState
    load: Load
    limits: Limits
    dtype: str
    joined_at: float
    num_in_flight: int


@dataclass(slots=True, kw_only=True)
class Replica:
    """One instance's record. ``in_flight`` are the runs with an attempt there: a set, so that
    counting cannot leak."""

    hello: Hello
    streams: bool
    joined_at: float
    ends_at: float | None
    load: Load
    state: InstanceState = InstanceState.READY
    lost_at: float = 0.0
    in_flight: set[str] = field(default_factory=set)
    failures_in_row: int = 0
    failures: float = 0.0
    failed_at: float = 0.0
    out_until: float | None = None
    trial: str | None = None
    observed_at: float = -FRESH_S
    rates: Rates = field(default_factory=Rates)
    correction: float = 1.0
    cold_p: float = 0.0
    start_wait_s: float = 0.0
    load_s: float = 0.0
    caches_prefixes: bool = False
    max_in_flight: int = NO_LIMIT
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RATIOS))
    due_at: float = math.inf

    def ejected(self, now: float) -> bool:
        """Whether it gets no requests; after its time out one run may try it."""
        return self.out_until is not None and (now < self.out_until or self.trial is not None)

    def recent_failures(self, now: float) -> float:
        """Failures, each counting half after ``FAILURE_HALF_LIFE_S``."""
        left = self.failures * 0.5 ** ((now - self.failed_at) / FAILURE_HALF_LIFE_S)
        return left if left > FORGOTTEN else 0.0

    def changes_at(self, now: float) -> float:
        """When the snapshot will be another one by time alone."""
        times = [math.inf]
        if self.failures:
            times.append(now + DECAY_STEP_S if self.recent_failures(now) else math.inf)
        if self.out_until is not None and now < self.out_until:
            times.append(self.out_until)
        if now - self.observed_at < FRESH_S:
            times.append(self.observed_at + FRESH_S)
        return min(times)

    def snapshot(self, now: float, usual: Usual = NOTHING_USUAL) -> ReplicaSnapshot:
        """Return what ``select`` reads of it; ``usual`` stands for what is not known."""
        hello = self.hello
        fresh = now - self.observed_at < FRESH_S
        others = usual.of(hello.digest, hello.site)
        rates = self.rates if fresh else others
        return ReplicaSnapshot(
            instance=hello.instance,
            site=hello.site,
            digest=hello.digest,
            state=self.state,
            ejected=self.ejected(now),
            context_tokens=hello.limits.context_tokens,
            max_rows=hello.limits.max_rows,
            num_busy=max(self.load.num_running + self.load.num_waiting, len(self.in_flight)),
            num_in_flight=len(self.in_flight),
            overhead_s=rates.overhead_s or others.overhead_s,
            prefill_tokens_per_s=rates.prefill_tokens_per_s or others.prefill_tokens_per_s,
            decode_tokens_per_s=rates.decode_tokens_per_s or others.decode_tokens_per_s,
            failures=self.recent_failures(now) if self.failures else 0.0,
            ends_in_s=None if self.ends_at is None else self.ends_at - now,
            correction=self.correction if fresh else 1.0,
            cold_p=self.cold_p,
            start_wait_s=self.start_wait_s,
            load_s=self.load_s,
            caches_prefixes=self.caches_prefixes,
            modes=hello.limits.modes,
            adapters=hello.limits.adapters,
            max_in_flight=self.max_in_flight,
        )

    def measured(self, now: float) -> ReplicaSnapshot:
        """Return the same with the rates that were last observed, however long ago."""
        return replace(
            self.snapshot(now),
            overhead_s=self.rates.overhead_s,
            prefill_tokens_per_s=self.rates.prefill_tokens_per_s,
            decode_tokens_per_s=self.rates.decode_tokens_per_s,
            correction=self.correction,
        )

    def view(self) -> ReplicaView:
        """Return what others may see of it."""
        hello = self.hello
        return ReplicaView(
            instance=hello.instance,
            site=hello.site,
            model=hello.model,
            digest=hello.digest,
            state=self.state,
            load=self.load,
            limits=hello.limits,
            dtype=hello.dtype,
            joined_at=self.joined_at,
            num_in_flight=len(self.in_flight),
        )


class Fleet:
    """All replicas, the recently lost ones included.

    ``version`` changes whenever a request that found no place might find one now, ``changes``
    whenever anything does by which a choice may be another one.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self.version = 0
        self.changes = 0
        self._settings = settings
        self._replicas: dict[str, Replica] = {}
        self._pool = Pool()
        self._awaited: set[str] = set()
        self._away: set[str] = set()
        """Those that are lost or out, and some that are back."""
        self._usual = Usual()
        self._due: list[tuple[float, str]] = []
        self._stale: dict[str, Replica] = {}
        """Those that have changed since they were put into the pool."""

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, instance: str) -> Replica | None:
        """Return the record of an instance, if it is known."""
        return self._replicas.get(instance)

    def snapshots(self, now: float) -> list[ReplicaSnapshot]:
        """Return all replicas as they are now."""
        return [replica.snapshot(now, self._usual) for replica in self._replicas.values()]

    def pool(self, now: float) -> Pool:
        """Return all replicas as they are now, in columns that are kept up to date."""
        self._advance(now)
        while self._due and self._due[0][0] <= self._pool.now:
            _, instance = heappop(self._due)
            if (replica := self._replicas.get(instance)) is not None:
                replica.due_at = math.inf
                self._changed(replica)
        self._refresh()
        return self._pool

    def any_of(self, digest: str, site: str | None = None) -> ReplicaSnapshot | None:
        """Return some replica of a version as it last was, one of the site if there is one."""
        groups = self._pool.groups.get(digest, {})
        rows = (self._pool.rows(groups[at]) for at in sorted(groups, key=lambda at: at != site))
        return next((self._pool.snapshots[some[0]] for some in rows if len(some)), None)

    def newcomer(
        self, instance: str, site: str, digest: str, ready_in_s: float
    ) -> ReplicaSnapshot | None:
        """Return what a replica that is on its way should be once it is there: like the others of
        its version, idle, and as fast as is usual at its site; ``None`` if there are no others."""
        if (like := self.any_of(digest, site)) is None:
            return None
        rates = self._usual.of(digest, site)
        return ReplicaSnapshot(
            instance=instance,
            site=site,
            digest=digest,
            state=InstanceState.READY,
            ejected=False,
            context_tokens=like.context_tokens,
            max_rows=like.max_rows,
            num_busy=0,
            num_in_flight=0,
            overhead_s=rates.overhead_s,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            decode_tokens_per_s=rates.decode_tokens_per_s,
            cold_p=1.0,
            start_wait_s=ready_in_s,
            modes=like.modes,
            adapters=like.adapters,
        )

    def has_room(self, instance: str) -> bool:
        """Whether an instance may have more attempts than it has."""
        replica = self._replicas.get(instance)
        if replica is None:
            return False
        most = int(replica.max_in_flight * (1.0 + self._settings.rows_ahead))
        return len(replica.in_flight) < most

    def digests_of(self, instances: Iterable[str]) -> set[str]:
        """Return the versions that instances serve."""
        known = (self._replicas.get(one) for one in instances)
        return {one.hello.digest for one in known if one is not None}

    def _advance(self, now: float) -> None:
        self._pool.now = max(now, self._pool.now)

    def _changed(self, replica: Replica) -> None:
        """A replica is another; the pool hears of it when it is asked for."""
        self.changes += 1
        self._stale[replica.hello.instance] = replica

    def _refresh(self) -> None:
        """Note in the pool how replicas are, and when time alone will change that."""
        now = self._pool.now
        for instance, replica in self._stale.items():
            self._pool.put(replica.snapshot(now, self._usual))
            changes_at = replica.changes_at(now)
            if changes_at < replica.due_at:
                replica.due_at = changes_at
                heappush(self._due, (changes_at, instance))
        self._stale.clear()

    def views(self) -> list[ReplicaView]:
        """Return the replicas that are there."""
        return [one.view() for one in self if one.state is not InstanceState.LOST]

    def join(self, now: float, hello: Hello, *, streams: bool, joined_at: float) -> None:
        """Add an instance; one that comes back starts with a clean record."""
        self._replicas[hello.instance] = Replica(
            hello=hello,
            streams=streams,
            joined_at=joined_at,
            ends_at=None if hello.deadline_s is None else now + hello.deadline_s,
            load=hello.load,
            max_in_flight=hello.limits.max_rows * (1 if streams else self._settings.blind_factor),
        )
        self._advance(now)
        self._changed(self._replicas[hello.instance])
        self._refresh()
        self.version += 1

    def report(self, instance: str, load: Load, *, draining: bool) -> None:
        """Note an instance's load, and that it has begun to drain."""
        replica = self._replicas.get(instance)
        if replica is None or replica.state is InstanceState.LOST:
            return
        begins = draining and replica.state is InstanceState.READY
        if not begins and load is replica.load:
            return
        replica.load = load
        if begins:
            replica.state = InstanceState.DRAINING
            self.version += 1
        self._changed(replica)

    def report_cold(
        self, instance: str, probability: float, *, start_wait_s: float, load_s: float
    ) -> None:
        """Note that an instance may have to be started before it serves, and what that takes."""
        if (replica := self._replicas.get(instance)) is not None:
            replica.cold_p, replica.start_wait_s, replica.load_s = probability, start_wait_s, load_s
            self._changed(replica)

    def leave(self, now: float, instance: str, *, lost: bool) -> None:
        """Forget an instance, at once or, if it was lost, after a while."""
        replica = self._replicas.get(instance)
        if replica is None:
            return
        if lost:
            replica.state, replica.lost_at = InstanceState.LOST, now
            self._away.add(instance)
            self._changed(replica)
        else:
            self._forget(instance)
        self.version += 1

    def tick(self, now: float) -> None:
        """Forget instances lost long ago, and let those back whose time out is over."""
        forget_s = self._settings.lost_memory_s
        for instance in list(self._away):
            one = self._replicas[instance]
            if one.state is not InstanceState.LOST and one.out_until is None:
                self._away.discard(instance)
            elif one.state is InstanceState.LOST and now - one.lost_at > forget_s:
                self._forget(instance)
                self.version += 1
            elif one.out_until is not None and now >= one.out_until and one.trial is None:
                self.version += 1

    def assign(self, now: float, instance: str, run_id: str) -> None:
        """A run has an attempt there."""
        replica = self._replicas[instance]
        replica.in_flight.add(run_id)
        if replica.out_until is not None and now >= replica.out_until:
            replica.trial = run_id
        self._advance(now)
        self._changed(replica)

    def release(self, instance: str, run_id: str) -> None:
        """The attempt is over, whatever came of it."""
        if (replica := self._replicas.get(instance)) is not None:
            replica.in_flight.discard(run_id)
            if replica.trial == run_id:
                replica.trial = None
            self._changed(replica)
            if replica.hello.site in self._awaited:
                self._awaited.discard(replica.hello.site)
                self.version += 1

    def await_place(self, sites: Iterable[str]) -> None:
        """Somebody waits until one of these sites has fewer requests in flight."""
        self._awaited.update(sites)

    def succeeded(self, instance: str) -> None:
        """An attempt ended as it should."""
        replica = self._replicas.get(instance)
        if replica is None:
            return
        replica.failures_in_row = 0
        if replica.out_until is not None:
            replica.out_until = None
            self.version += 1
            self._changed(replica)

    def failed(self, now: float, instance: str) -> None:
        """An attempt failed by the replica's fault; after too many in a row it is out."""
        replica = self._replicas.get(instance)
        if replica is None:
            return
        replica.failures = replica.recent_failures(now) + 1.0
        replica.failed_at = now
        replica.failures_in_row += 1
        again = replica.out_until is not None
        if again or (
            replica.failures_in_row >= self._settings.eject_after and self._may_eject(replica)
        ):
            replica.out_until = now + self._settings.eject_s
            self._away.add(instance)
        self._advance(now)
        self._changed(replica)

    def observed(
        self,
        now: float,
        instance: str,
        *,
        prompt_tokens: int,
        first_token_s: float,
        decode_tokens_per_s: float,
        ratio: float = 0.0,
        cached_tokens: int = 0,
    ) -> None:
        """Note how fast one attempt was; a rate of 0 says nothing.

        Args:
            now: When it ended.
            instance: Who ran it.
            prompt_tokens: Of the prompt.
            first_token_s: Seconds until the first token came.
            decode_tokens_per_s: From the first to the last.
            ratio: Observed over predicted seconds, the prediction taken as it was uncorrected.
            cached_tokens: Tokens of the prompt that it had from before.
        """
        replica = self._replicas.get(instance)
        if replica is None:
            return
        seen = Rates(decode_tokens_per_s=decode_tokens_per_s)
        if prompt_tokens >= LONG_PROMPT_TOKENS and first_token_s > 0:
            seen.prefill_tokens_per_s = prompt_tokens / first_token_s
        else:
            seen.overhead_s = first_token_s
        replica.rates.add(seen)
        low, high = CORRECTIONS
        if ratio:
            replica.ratios.append(ratio)
            replica.correction = mean(replica.correction, min(high, max(low, ratio)))
        replica.caches_prefixes |= cached_tokens > 0
        replica.observed_at = now
        self._advance(now)
        self._changed(replica)
        digest, site = replica.hello.digest, replica.hello.site
        groups = self._pool.groups[digest]
        for changed in self._usual.observe(digest, site, seen, groups):
            # What is usual there stands for what is not known of its replicas.
            for row in self._pool.rows(groups[changed]).tolist():
                self._changed(self._replicas[self._pool.snapshots[row].instance])

    def _forget(self, instance: str) -> None:
        del self._replicas[instance]
        self.changes += 1
        self._stale.pop(instance, None)
        self._away.discard(instance)
        self._pool.drop(instance)

    def _may_eject(self, replica: Replica) -> bool:
        peers = [
            one
            for one in self
            if one.hello.digest == replica.hello.digest and one.state is not InstanceState.LOST
        ]
        num_out = sum(one.out_until is not None for one in peers)
        return 2 * (num_out + 1) <= len(peers)
