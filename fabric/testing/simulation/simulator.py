"""The sites' side of a simulation: replicas that queue, compute, sleep, fail and come back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache

import simpy

from fabric.broker.lengths import Lengths
from fabric.broker.select import expected_tokens
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    AbandonAttempt,
    Admitted,
    AttemptEvent,
    AttemptLost,
    CancelAttempt,
    Emit,
    HoldMoved,
    Instruction,
    MoveHold,
    Outcome,
    ReplicaJoined,
    ReplicaLeft,
    SendTask,
    Settle,
    StateEvent,
    Tick,
    Ticket,
    Void,
)
from fabric.broker.state import BrokerState
from fabric.errors import SessionLost
from fabric.messages import Accepted, Finished, Hello, Limits, RunState, Task, Token, Usage
from fabric.messages.events import FinishReason
from fabric.testing.simulation.baselines import BASELINES
from fabric.testing.simulation.prices import Prices
from fabric.testing.simulation.report import End, Report
from fabric.testing.simulation.traces import PREFIX_TOKENS, Arrival
from fabric.testing.simulation.world import CONTEXT_TOKENS, DIGEST, SiteSketch, World

Process = Generator[simpy.Event, object, None]

LONG_AGO = -1_000.0
"""When the hub came up, so that no replica is expected any more."""
OVERHEAD_S = 0.03
TICK_S = 0.5


@dataclass(slots=True, kw_only=True)
class _Replica:
    """An instance; ``ready`` is the start under way or done, ``None`` while it sleeps."""

    name: str
    site: SiteSketch
    speed: float
    sleeps: bool
    rows: simpy.Resource
    ready: simpy.Event | None = None
    used_at: float = 0.0
    up: bool = True
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    work: dict[tuple[str, int], simpy.Process] = field(default_factory=dict)


class Simulator:
    """One world, one trace, one way to choose.

    Args:
        world: Sites and links.
        trace: Requests in the order of their arrival; each is read when it comes.
        policy: A key of ``BASELINES``; ``fabric`` is the broker's own.
        seed: Of failures, waits and the speeds of replicas: the same for every policy.
        settings: Of the broker; its bandwidths are the world's.
    """

    def __init__(
        self,
        world: World,
        trace: Iterable[Arrival],
        policy: str = "fabric",
        *,
        seed: int = 1,
        settings: BrokerSettings | None = None,
    ) -> None:
        self.report = Report(policy=policy)
        self._world = world
        self._trace = trace
        self._arrivals: dict[str, Arrival] = {}
        self._is_over = False
        self._drawn = random.Random(seed)  # noqa: S311
        self._settings = settings or BrokerSettings(
            tick_s=TICK_S,
            bandwidth_bytes_per_s=world.bandwidth_bytes_per_s,
            bandwidths_bytes_per_s=world.bandwidths_bytes_per_s,
        )
        # Others' ways to choose have no line at the hub.
        fair = self._settings.fair and policy == "fabric"
        self._settings = replace(self._settings, fair=fair)
        self._env = simpy.Environment()
        self._lengths = Lengths()
        self._state = BrokerState(
            self._settings,
            started_at=LONG_AGO,
            decide=BASELINES[policy](world),
            lengths=self._lengths,
        )
        self._rates = {site.name: site.rate() for site in world.sites}
        self._prices = Prices(self._rates)
        self._replicas: dict[str, _Replica] = {}
        self._where: dict[tuple[str, int], _Replica] = {}
        self._events: deque[StateEvent] = deque()
        self._handling = False
        self._done = self._env.event()

    def run(self) -> Report:
        """Simulate until the last request has ended, and return what was noticed."""
        for site in self._world.sites:
            for index in range(site.num_replicas):
                self._add(site, index)
        self._env.process(self._arrive())
        self._env.process(self._tick())
        self._env.run(until=self._done)
        return self.report

    # ---- the hub --------------------------------------------------------------------------------

    def _feed(self, event: StateEvent) -> None:
        if self._handling:
            self._events.append(event)
            return
        self._handling = True
        self._do(self._state.handle(event))
        while self._events:
            self._do(self._state.handle(self._events.popleft()))
        self._handling = False

    def _do(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            if not isinstance(instruction, Emit):  # nobody reads the answers
                self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case SendTask(instance=instance, task=task):
                replica = self._replicas[instance]
                process = self._env.process(self._serve(replica, task))
                replica.work[task.id, task.attempt] = process
                self._where[task.id, task.attempt] = replica
            case MoveHold(run_id=run_id):
                self._feed(HoldMoved(now=self._env.now, run_id=run_id))
            case (
                AbandonAttempt(run_id=run_id, attempt=attempt)
                | CancelAttempt(run_id=run_id, attempt=attempt)
            ):
                if (where := self._where.get((run_id, attempt))) is not None:
                    self._stop([(run_id, attempt)], where)
            case Settle(outcome=outcome) | Void(outcome=outcome):
                self._conclude(outcome)

    def _conclude(self, outcome: Outcome) -> None:
        assert isinstance(outcome.ticket, Ticket)
        arrival = self._arrivals.pop(outcome.ticket.request.id)
        completed = outcome.state is RunState.COMPLETED
        deadline_s = arrival.request.deadline_s
        self.report.ends.append(
            End(
                run_id=arrival.request.id,
                project=arrival.project,
                at_s=arrival.at_s,
                slo_s=arrival.slo_s,
                alone_s=arrival.alone_s,
                total_s=outcome.total_s if completed else max(deadline_s, outcome.total_s),
                charge_usu=outcome.charge_usu,
                attempts=outcome.attempts,
                site=outcome.placement.site if outcome.placement else None,
                completed=completed,
            )
        )
        self._check_done()

    def _check_done(self) -> None:
        if self._is_over and not self._arrivals and not self._done.triggered:
            self._done.succeed()

    def _arrive(self) -> Process:
        for arrival in self._trace:
            yield self._env.timeout(max(0.0, arrival.at_s - self._env.now))
            now = self._env.now
            self._arrivals[arrival.request.id] = arrival
            self._feed(Admitted(now=now, started_at=now, ticket=self._ticket(arrival)))
        self._is_over = True
        self._check_done()

    def _tick(self) -> Process:
        while True:
            yield self._env.timeout(TICK_S)
            self._feed(Tick(now=self._env.now))

    def _ticket(self, arrival: Arrival) -> Ticket:
        request = arrival.request
        most = request.prompt_tokens_bound(), request.sampling.max_tokens or 0
        likely = expected_tokens(request, self._lengths)
        return Ticket(
            request=request,
            project=arrival.project,
            key_id=arrival.project,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            model="simulated@1",
            digest=DIGEST,
            offers=self._prices.offers(arrival.project, most, likely),
            rates=self._rates,
            held_allocation=arrival.project,
            held_usu=self._prices.highest_usu(most),
            prompt_tokens_bound=most[0],
            max_output_tokens=most[1],
        )

    # ---- the sites ------------------------------------------------------------------------------

    def _add(self, site: SiteSketch, index: int) -> None:
        replica = _Replica(
            name=f"{site.name}-{index}",
            site=site,
            speed=self._drawn.uniform(0.8, 1.2),
            sleeps=index >= site.num_replicas - site.num_cold,
            rows=simpy.Resource(self._env, capacity=site.max_rows),
        )
        self._replicas[replica.name] = replica
        self._join(replica)
        if site.mtbf_s is not None:
            self._env.process(self._fail(replica, site.mtbf_s, self._drawn.random()))

    def _join(self, replica: _Replica) -> None:
        site = replica.site
        limits = Limits(
            context_tokens=CONTEXT_TOKENS, max_rows=site.max_rows, cache_tokens=CONTEXT_TOKENS
        )
        hello = Hello(
            instance=replica.name,
            site=site.name,
            model="simulated@1",
            digest=DIGEST,
            limits=limits,
            dtype="float16",
            engine="simulated",
        )
        self._feed(ReplicaJoined(now=self._env.now, hello=hello, streams=True, joined_at=0.0))
        if replica.sleeps:
            self._sleep(replica)

    def _sleep(self, replica: _Replica) -> None:
        replica.ready = None
        site = replica.site
        self._state.fleet.report_cold(
            replica.name, 1.0, start_wait_s=site.start_wait_s, load_s=site.load_s
        )

    def _start(self, replica: _Replica) -> Process:
        """Wait in the scheduler's queue, load, and sleep again when there is nothing to do."""
        ready = replica.ready = self._env.event()
        self.report.num_cold_starts += 1
        site = replica.site
        yield self._env.timeout(site.start_wait_s + site.load_s)
        self._state.fleet.report_cold(replica.name, 0.0, start_wait_s=0.0, load_s=0.0)
        ready.succeed()
        replica.used_at = self._env.now
        while replica.ready is ready:
            idle_s = self._env.now - replica.used_at
            if not replica.work and idle_s >= site.idle_s:
                self._sleep(replica)
                return
            yield self._env.timeout(max(1.0, site.idle_s - idle_s))

    def _fail(self, replica: _Replica, mtbf_s: float, seed: float) -> Process:
        """Lose the replica now and then, with all it does, and bring it back."""
        drawn, site = random.Random(seed), replica.site  # noqa: S311
        while True:
            yield self._env.timeout(drawn.expovariate(1 / mtbf_s))
            replica.up, now = False, self._env.now
            self._feed(ReplicaLeft(now=now, instance=replica.name, lost=True))
            for run_id, attempt in self._stop(list(replica.work), replica):
                error = SessionLost(instance=replica.name, reason="its node failed")
                self._feed(AttemptLost(now=now, run_id=run_id, attempt=attempt, error=error))
            replica.ready = None
            replica.prefixes.clear()
            yield self._env.timeout(site.start_wait_s + site.load_s)
            replica.up = True
            self._join(replica)

    def _stop(self, keys: Iterable[tuple[str, int]], replica: _Replica) -> list[tuple[str, int]]:
        stopped = []
        for key in keys:
            if (process := replica.work.pop(key, None)) is not None:
                stopped.append(key)
                if process.is_alive and process is not self._env.active_process:
                    process.interrupt()
        return stopped

    def _serve(self, replica: _Replica, task: Task) -> Process:
        """Bring the data, wait for a row, read the prompt, write the answer."""
        key, arrival = (task.id, task.attempt), self._arrivals[task.id]
        try:
            yield from self._bring_data(arrival, replica.site.name)
            if replica.sleeps:
                if replica.ready is None:
                    self._env.process(self._start(replica))
                    yield self._env.timeout(0)
                assert replica.ready is not None
                yield replica.ready
            with replica.rows.request() as row:
                yield row
                yield from self._compute(replica, task, arrival)
        except simpy.Interrupt:
            pass
        finally:
            replica.work.pop(key, None)
            self._where.pop(key, None)
            replica.used_at = self._env.now

    def _bring_data(self, arrival: Arrival, site: str) -> Process:
        home, num_bytes = arrival.request.data_site, arrival.request.data_bytes
        if home is None or home == site:
            return
        self.report.bytes_moved += num_bytes
        yield self._env.timeout(num_bytes / self._world.bandwidth(home, site))

    def _compute(self, replica: _Replica, task: Task, arrival: Arrival) -> Process:
        site = replica.site
        slow = 1.0 + site.slowdown * replica.rows.count / site.max_rows
        cached = PREFIX_TOKENS if arrival.prefix in replica.prefixes else 0
        self._remember(replica, arrival.prefix)
        fresh = arrival.prompt_tokens - cached + len(task.prefix)
        prefill_s = OVERHEAD_S + fresh / (site.prefill_tokens_per_s * replica.speed)
        self._say(
            task, Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=fresh + cached)
        )
        yield self._env.timeout(prefill_s * slow)
        begin, end = len(task.prefix), arrival.output_tokens
        self._say(task, _token(begin, begin + 1 == end))
        left = end - begin - 1
        yield self._env.timeout(left / (site.decode_tokens_per_s * replica.speed) * slow)
        for position in range(begin + 1, end):
            self._say(task, _token(position, position + 1 == end))
        usage = Usage(
            prompt_tokens=fresh + cached, cached_prompt_tokens=cached, output_tokens=end - begin
        )
        finished = Finished(
            task_id=task.id, attempt=task.attempt, finish_reasons=("stop",), usage=usage
        )
        self._say(task, finished)

    def _say(self, task: Task, event: Accepted | Token | Finished) -> None:
        self._feed(
            AttemptEvent(now=self._env.now, run_id=task.id, attempt=task.attempt, event=event)
        )

    def _remember(self, replica: _Replica, prefix: int) -> None:
        if prefix < 0:
            return
        replica.prefixes[prefix] = None
        replica.prefixes.move_to_end(prefix)
        if len(replica.prefixes) > self._world.cached_prefixes:
            replica.prefixes.popitem(last=False)


def simulate(
    world: World,
    trace: Iterable[Arrival],
    policy: str = "fabric",
    *,
    seed: int = 1,
    settings: BrokerSettings | None = None,
) -> Report:
    """Return what users and accounts notice of a trace under a policy of ``BASELINES``."""
    return Simulator(world, trace, policy, seed=seed, settings=settings).run()


@cache
def _token(position: int, last: bool) -> Token:
    """Return a token; those of all runs are the same, and the state looks at the attempt's key."""
    reason: FinishReason | None = "stop" if last else None
    return Token(
        task_id="",
        attempt=1,
        choice=0,
        position=position,
        token_id=0,
        text="",
        finish_reason=reason,
    )
