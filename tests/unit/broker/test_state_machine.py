"""Whatever replicas, clients and the clock do, and in whatever order, the promises hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fabric.broker.select import Offer
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    AbandonAttempt,
    Admitted,
    AttemptEvent,
    AttemptLost,
    ClientGone,
    Emit,
    HoldMoved,
    HoldRefused,
    MoveHold,
    ReplicaJoined,
    ReplicaLeft,
    ReplicaReported,
    SendTask,
    Settle,
    StateEvent,
    Tick,
    Ticket,
    Void,
)
from fabric.broker.state import BrokerState
from fabric.errors import EngineStopped, RequestCancelled, RowFailed, SessionLost
from fabric.ledger import Rate
from fabric.messages import (
    Accepted,
    Event,
    Failed,
    Failure,
    Finished,
    Hello,
    InstanceState,
    Limits,
    Load,
    Request,
    RunCompleted,
    RunFailed,
    Sampling,
    TextInput,
    Token,
    Usage,
)

SITES = ("alpha", "beta", "gamma")
DIGEST = "sha256:aa"
MAX_TOKENS = 3
HELD_USU = 60
RATES = {
    site: Rate(
        model="*",
        site=site,
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        prompt_usu=Decimal(price),
        cached_prompt_usu=Decimal(0),
        output_usu=Decimal(price),
    )
    for price, site in enumerate(SITES, start=1)
}
# Gamma is paid by another allocation, so that a run must move its hold to go there.
OFFERS = {
    site: Offer(
        site=site,
        allocation="private" if site == "gamma" else "general",
        available_usu=1_000,
        max_charge_usu=HELD_USU,
        expected_charge_usu=10,
    )
    for site in SITES
}
SAMPLINGS = (
    Sampling(max_tokens=MAX_TOKENS, temperature=0.0),
    Sampling(max_tokens=MAX_TOKENS, temperature=1.0),
    Sampling(max_tokens=MAX_TOKENS, temperature=1.0, seed=7, n=2),
)


class Broker(RuleBasedStateMachine):
    """Plays the world around a ``BrokerState`` and keeps its own books of what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.state = BrokerState(
            BrokerSettings(
                eject_after=2,
                retry_burst=4.0,
                patience_s=5.0,
                cancel_grace_s=1.0,
                hedge_samples=1,
                hedge_quantile=0.5,
                hedge_min_s=0.1,
            ),
            started_at=0.0,
        )
        self.digests: dict[str, str] = {}
        self.requests: dict[str, Request] = {}
        self.sent: dict[tuple[str, int], SendTask] = {}
        self.live: dict[tuple[str, int], SendTask] = {}
        self.moving: set[str] = set()
        self.moved: set[str] = set()
        self.has_ticked = False
        self.rooms: dict[str, int] = {}
        self.closings: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.positions: dict[tuple[str, int], list[int]] = defaultdict(list)

    # ---- the books ------------------------------------------------------------------------------

    def feed(self, event: StateEvent) -> None:
        self.has_ticked = False
        for out in self.state.handle(event):
            run_id = out.run_id
            assert not self.ends[run_id], "an instruction for a run that has ended"
            match out:
                case SendTask(task=task, instance=instance):
                    beside = [one for one in self.live.values() if one.run_id == run_id]
                    assert len(beside) <= 1, "three live attempts"
                    assert all(one.instance != instance for one in beside)
                    assert not (beside and self.positions[run_id, 0]), "it has answered already"
                    assert self.digests[instance] == task.digest == DIGEST
                    assert task.attempt <= 3
                    if task.attempt == 1 and run_id not in self.moved:
                        there = sum(one.instance == instance for one in self.live.values())
                        assert there < self.rooms[instance], "more than there are rows for"
                    emitted = self.positions[run_id, 0]
                    assert task.prefix == tuple(emitted) or not task.prefix
                    assert task.prefix or not emitted, "delivered tokens would come again"
                    assert (run_id, task.attempt) not in self.sent, "a number used twice"
                    self.live[run_id, task.attempt] = self.sent[run_id, task.attempt] = out
                case AbandonAttempt(attempt=attempt):
                    del self.live[run_id, attempt]
                case MoveHold():
                    self.moving.add(run_id)
                    self.moved.add(run_id)
                case Settle(outcome=outcome) | Void(outcome=outcome):
                    self.closings[run_id] += 1
                    assert 0 <= outcome.charge_usu <= HELD_USU
                    assert isinstance(out, Settle) or outcome.charge_usu == 0
                case Emit(event=RunCompleted() | RunFailed()):
                    assert self.closings[run_id] == 1, "an end before its settlement"
                    self.ends[run_id] += 1
                case Emit(event=Token(choice=choice, position=position)):
                    seen = self.positions[run_id, choice]
                    assert position == len(seen) < MAX_TOKENS
                    seen.append(position)

    def say(self, sent: SendTask, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            self.live.pop(key_of(sent), None)
        self.feed(
            AttemptEvent(now=self.now, run_id=sent.run_id, attempt=sent.task.attempt, event=event)
        )

    # ---- the world ------------------------------------------------------------------------------

    @initialize()
    def all_sites_join(self) -> None:
        for site in SITES:
            self.join(site, 1, DIGEST, streams=True, max_rows=2)

    @rule(
        site=st.sampled_from(SITES),
        number=st.integers(1, 2),
        digest=st.sampled_from([DIGEST, DIGEST, DIGEST, "sha256:bb"]),
        streams=st.booleans(),
        max_rows=st.sampled_from([1, 4]),
    )
    def join(self, site: str, number: int, digest: str, *, streams: bool, max_rows: int) -> None:
        instance = f"{site}-{number}"
        if any(one.instance == instance for one in self.live.values()):
            return
        self.digests[instance] = digest
        self.rooms[instance] = int(1.2 * (max_rows if streams else 4 * max_rows))
        hello = Hello(
            instance=instance,
            site=site,
            model="smol@1",
            digest=digest,
            limits=Limits(context_tokens=64, max_rows=max_rows, cache_tokens=256),
            dtype="float32",
            engine="test",
        )
        self.feed(ReplicaJoined(now=self.now, hello=hello, streams=streams, joined_at=0.0))

    @rule(data=st.data(), lost=st.booleans())
    @precondition(lambda self: self.digests)
    def leave(self, data: st.DataObject, lost: bool) -> None:
        instance = data.draw(st.sampled_from(sorted(self.digests)))
        self.feed(ReplicaLeft(now=self.now, instance=instance, lost=lost))
        for sent in [one for one in self.live.values() if one.instance == instance]:
            self.lose(sent)

    @rule(data=st.data(), draining=st.booleans())
    @precondition(lambda self: self.digests)
    def report(self, data: st.DataObject, draining: bool) -> None:
        instance = data.draw(st.sampled_from(sorted(self.digests)))
        self.feed(ReplicaReported(now=self.now, instance=instance, load=Load(), draining=draining))

    @rule(
        sampling=st.sampled_from(SAMPLINGS),
        deadline_s=st.sampled_from([3.0, 60.0]),
        sites=st.sampled_from([None, ("alpha",), ("beta", "gamma")]),
        tier=st.sampled_from(["interactive", "standard", "standard", "batch"]),
        project=st.sampled_from(["astro", "bio"]),
    )
    def admit(
        self,
        sampling: Sampling,
        deadline_s: float,
        sites: tuple[str, ...] | None,
        tier: Literal["interactive", "standard", "batch"],
        project: str,
    ) -> None:
        run_id = f"run_{len(self.requests)}"
        request = self.requests[run_id] = Request(
            id=run_id,
            model="smol",
            input=TextInput(text="Why?"),
            sampling=sampling,
            deadline_s=deadline_s,
            sites=sites,
            tier=tier,
        )
        ticket = Ticket(
            request=request,
            project=project,
            key_id="key",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            model="smol@1",
            digest=DIGEST,
            offers=OFFERS,
            rates=RATES,
            held_allocation="general",
            held_usu=HELD_USU,
            prompt_tokens_bound=5,
            max_output_tokens=MAX_TOKENS,
        )
        self.feed(Admitted(now=self.now, started_at=self.now, ticket=ticket))

    @rule(data=st.data(), moved=st.booleans())
    @precondition(lambda self: self.moving)
    def answer_move(self, data: st.DataObject, moved: bool) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.moving)))
        self.moving.discard(run_id)
        kind = HoldMoved if moved else HoldRefused
        self.feed(kind(now=self.now, run_id=run_id))

    @rule()
    @precondition(lambda self: self.live)
    def all_attempts_advance(self) -> None:
        for sent in list(self.live.values()):
            for choice in range(sent.task.request.sampling.n):
                self.next_token(sent, choice)

    def next_token(self, sent: SendTask, choice: int) -> None:
        position = len(self.positions[sent.run_id, choice])
        if position < MAX_TOKENS:
            self.token(sent, choice, position)

    def token(self, sent: SendTask, choice: int, position: int) -> None:
        token = Token(
            task_id=sent.run_id,
            attempt=sent.task.attempt,
            choice=choice,
            position=position,
            token_id=position,
            text="t",
            finish_reason="length" if position == MAX_TOKENS - 1 else None,
        )
        self.say(sent, token)

    @rule(
        data=st.data(),
        late=st.booleans(),
        rogue=st.sampled_from([False] * 7 + [True]),
        prompt_tokens=st.integers(0, 99),
    )
    @precondition(lambda self: self.live)
    def speak(self, data: st.DataObject, late: bool, rogue: bool, prompt_tokens: int) -> None:
        """An attempt, live or long over, says something, true or false."""
        sent = self.sent[data.draw(st.sampled_from(sorted(self.sent if late else self.live)))]
        key = {"task_id": sent.run_id, "attempt": sent.task.attempt}
        num_choices = sent.task.request.sampling.n
        counts = [len(self.positions[sent.run_id, choice]) for choice in range(num_choices)]
        done = all(count == MAX_TOKENS for count in counts)
        choice = data.draw(st.integers(0, num_choices if rogue else num_choices - 1))
        position = data.draw(st.integers(0, 4)) if rogue else counts[choice]
        usage = Usage(prompt_tokens=prompt_tokens, output_tokens=prompt_tokens)
        kinds = ["accepted", "failed", "finished"] if done or rogue else ["accepted", "failed"]
        match data.draw(st.sampled_from([*kinds, *["token"] * 5])):
            case "accepted":
                self.say(sent, Accepted(**key, prompt_tokens=prompt_tokens))
            case "token":
                self.token(sent, choice, position)
            case "finished" if key_of(sent) not in self.live or done:
                reasons = ("length",) * num_choices
                self.say(sent, Finished(**key, finish_reasons=reasons, usage=usage))
            case "failed":
                error = data.draw(
                    st.sampled_from(
                        [EngineStopped(reason="x"), RowFailed(reason="x"), RequestCancelled()]
                    )
                )
                self.say(sent, Failed(**key, failure=Failure.of(error), usage=usage))

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def lose_one(self, data: st.DataObject) -> None:
        self.lose(self.live[data.draw(st.sampled_from(sorted(self.live)))])

    def lose(self, sent: SendTask) -> None:
        if self.live.pop(key_of(sent), None) is None:
            return
        error = SessionLost(instance=sent.instance, reason="gone")
        self.feed(
            AttemptLost(now=self.now, run_id=sent.run_id, attempt=sent.task.attempt, error=error)
        )

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def client_leaves(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.feed(ClientGone(now=self.now, run_id=run_id))

    @rule(seconds=st.sampled_from([0.1, 0.1, 0.5, 2.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick(now=self.now))
        self.has_ticked = True

    # ---- the promises ---------------------------------------------------------------------------

    @invariant()
    def runs_end_once_and_close_once(self) -> None:
        assert set(self.state.runs) == set(self.requests) - set(self.ends)
        assert self.closings == self.ends
        assert all(count == 1 for count in self.ends.values())

    @invariant()
    def one_attempt_is_left_once_it_has_answered(self) -> None:
        runs = Counter(sent.run_id for sent in self.live.values())
        assert all(count == 1 or not self.positions[run, 0] for run, count in runs.items())

    @invariant()
    def counters_do_not_leak(self) -> None:
        live = Counter(sent.instance for sent in self.live.values())
        counted = Counter(
            {one.hello.instance: len(one.in_flight) for one in self.state.fleet if one.in_flight}
        )
        assert counted <= live
        for instance in {one.hello.instance for one in self.state.fleet}:
            assert counted[instance] == live[instance]

    @invariant()
    def those_in_line_are_those_that_had_no_turn(self) -> None:
        in_line = {run_id for run_id, run in self.state.runs.items() if run.in_line}
        assert sum(one.num_waiting for one in self.state.line.waiting()) == len(in_line)
        assert not in_line & (self.live.keys() | self.moving)

    @invariant()
    def nobody_waits_where_all_is_idle(self) -> None:
        """What could go anywhere has gone, once time has passed, unless nowhere takes it."""
        if self.live or self.state.runs.keys() & self.moving or not self.has_ticked:
            return
        ready = [
            one
            for one in self.state.fleet.pool(self.now).snapshots
            if one.digest == DIGEST and one.state is InstanceState.READY and not one.ejected
        ]
        for run_id, run in self.state.runs.items():
            request = self.requests[run_id]
            assert not run.in_line or not any(
                one.site in (request.sites or SITES) and request.sampling.n <= one.max_rows
                for one in ready
            )

    def teardown(self) -> None:
        self.now += 100.0
        self.feed(Tick(now=self.now))
        assert not self.state.runs
        assert not self.live
        assert set(self.ends) == set(self.requests)
        assert not self.state.line.waiting()
        assert not self.state.line._turns


def key_of(sent: SendTask) -> tuple[str, int]:
    return sent.run_id, sent.task.attempt


Broker.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPromises = Broker.TestCase
