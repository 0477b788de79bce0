"""The broker's mind: events in, instructions out. It does no I/O and has no clock.

Every admitted run ends exactly once, with one ``Settle`` or ``Void`` and one last ``Emit``; it has
two live attempts at most, and only until one says something; its client sees every token once and
in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from fabric.broker.budget import RetryBudget
from fabric.broker.coming import Arrivals
from fabric.broker.experience import Experience
from fabric.broker.hedge import suits
from fabric.broker.lengths import Lengths
from fabric.broker.line import Line
from fabric.broker.outcome import (
    backoff_s,
    broken,
    get_closing,
    get_completed,
    get_failed,
    get_outcome,
    not_its_to_say,
    too_late,
)
from fabric.broker.pool import Replicas
from fabric.broker.progress import Progress
from fabric.broker.races import Races
from fabric.broker.replicas import Fleet
from fabric.broker.select import Context, Decision, decide, full_sites, may_come
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    AbandonAttempt,
    Admitted,
    AttemptEvent,
    AttemptLost,
    CancelAttempt,
    ClientGone,
    ClientSlow,
    Emit,
    HoldMoved,
    HoldRefused,
    Instruction,
    MoveHold,
    Outcome,
    ReplicaExpected,
    ReplicaGivenUp,
    ReplicaJoined,
    ReplicaLeft,
    ReplicaReported,
    SendTask,
    StateEvent,
    Tick,
)
from fabric.broker.tasks import Tasks
from fabric.errors import (
    DeadlineExceeded,
    FabricError,
    FirstTokenTimeout,
    NoReplica,
    ProtocolViolation,
    RequestCancelled,
)
from fabric.messages import (
    Accepted,
    Embedding,
    Failed,
    Finished,
    Placed,
    Placement,
    PromptScored,
    Request,
    RunState,
    Saves,
    Token,
    Usage,
)

Instructions = Iterator[Instruction]

Decide = Callable[[Request, Replicas, Context], Decision]
"""A way to choose; raises ``NoReplica``."""


class BrokerState:
    """All runs and replicas.

    Args:
        settings: Limits and weights.
        started_at: When the hub came up: for a while after it, replicas are still expected.
        decide: Where a request goes; simulations compare others with ours.
        salt_key: A secret, from which each project gets the salt of its cached prefixes.
        lengths: Where the lengths of answers are noted; admission prices by them.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        started_at: float,
        decide: Decide = decide,
        salt_key: bytes = b"",
        lengths: Lengths | None = None,
    ) -> None:
        self.fleet = Fleet(settings)
        self.arrivals = Arrivals(self.fleet)
        self.runs: dict[str, Progress] = {}
        self._settings = settings
        self._started_at = started_at
        self._tasks = Tasks(settings, salt_key)
        self._budget = RetryBudget(settings)
        self.line = Line(settings, self.fleet)
        self._decide = self.line.keeping_promises(decide)
        self._races = Races(settings, self.fleet, self._release)
        self.experience = Experience(
            settings, self.fleet, self.arrivals, self._races.waits, lengths
        )

    def handle(self, event: StateEvent) -> list[Instruction]:
        """Take one event and return what is to be done, in order."""
        if isinstance(event, AttemptEvent) and (said := self._on_next_token(event)) is not None:
            return said
        done = list(self._on_event(event))
        if self.line.has_freed:
            done += self._take_turns(event.now)
        return done

    def foresee(
        self, now: float, request: Request, context: Context, *, project: str
    ) -> Placement | None:
        """Return where a request would go now, or ``None`` if it would wait for a replica. It is
        expected from now on.

        Raises:
            NoReplica: No wait could help.
            Overloaded: It would have to wait for too long.
            TierNotHeld: Its tier's promise cannot be held.
        """
        replicas, context = self.fleet.pool(now), self.experience.informed(now, request, context)
        try:
            decision = self._decide(request, replicas, context)
        except NoReplica as error:
            may_come_back = self._may_wait(now) or may_come(request, replicas, context)
            if may_come_back or self.arrivals.in_time(request, context, now):
                return None
            raise self.arrivals.told_in(error, request, context, now) from None
        self.line.foresee(now, request, project, context, decision)
        return decision.bare()

    def _on_event(self, event: StateEvent) -> Instructions:
        now = event.now
        match event:
            case AttemptEvent():
                yield from self._on_attempt_event(event)
            case Admitted():
                yield from self._on_admitted(event)
            case Tick():
                yield from self._on_tick(now)
            case AttemptLost(run_id=run_id, attempt=attempt, error=error):
                run = self.runs.get(run_id)
                if run is not None and run.hedge is not None and run.hedge.attempt == attempt:
                    self._races.lose(run, now)
                elif (run := self._live(run_id, attempt)) is not None:
                    yield from self._on_lost(run, now, error)
            case ClientSlow(run_id=run_id):
                if (run := self.runs.get(run_id)) is not None:
                    run.held_back = True
            case ClientGone(run_id=run_id):
                if (run := self.runs.get(run_id)) is not None:
                    yield from self._on_client_gone(run, now)
            case HoldMoved(run_id=run_id):
                if (run := self.runs.get(run_id)) is not None:
                    yield from self._on_hold_moved(run, now)
            case HoldRefused(run_id=run_id):
                if (run := self.runs.get(run_id)) is not None and run.moving_to is not None:
                    run.refused_sites.add(run.moving_to.site)
                    run.moving_to = None
                    yield from self._place(run, now)
            case ReplicaExpected():
                self.arrivals.expect(event)
            case ReplicaGivenUp(instance=instance):
                self.arrivals.forget(instance)
            case ReplicaJoined(hello=hello):
                self.arrivals.forget(hello.instance)
                self.fleet.join(now, hello, streams=event.streams, joined_at=event.joined_at)
                yield from self._place_waiting(now)
            case ReplicaReported():
                self.fleet.report(event.instance, event.load, draining=event.draining)
            case ReplicaLeft(instance=instance, lost=lost):
                self.fleet.leave(now, instance, lost=lost)

    # ---- admission and placement ----------------------------------------------------------------

    def _on_admitted(self, event: Admitted) -> Instructions:
        ticket = event.ticket
        run = self.runs[ticket.request.id] = Progress(
            ticket=ticket,
            started_at=event.started_at,
            deadline_at=event.started_at + ticket.request.deadline_s,
            held_allocation=ticket.held_allocation,
            held_usu=ticket.held_usu,
            waiting_since=event.now,
        )
        self.experience.keep(run, event.now)
        self._budget.deposit()
        foreseen = None if self.arrivals or run.own else self.line.foreseen(run, event.now)
        if self.line.join(run):
            yield from self._place(run, event.now, foreseen)

    def _place_waiting(self, now: float) -> Instructions:
        for run in list(self.runs.values()):
            if run.instance is None and run.moving_to is None and not run.in_line:
                yield from self._place(run, now)
        yield from self._take_turns(now, everyone=True)

    def _take_turns(self, now: float, *, everyone: bool = False) -> Instructions:
        for run_id in self.line.turns(everyone=everyone):
            yield from self._place(self.runs[run_id], now)

    def _place(self, run: Progress, now: float, foreseen: Decision | None = None) -> Instructions:
        """Send a run that waits to the best replica, let it wait on, or end it.

        All retries share one budget, and a replica that has just failed the run gets a pause.
        Where another is on its way in time, patience lasts to the deadline, but not for a stream
        that has begun: nobody wants to read on minutes later. ``foreseen`` is still the choice.
        """
        awaited = self._awaits(run, now)
        waited_s = now - self.line.waits_since(run)
        out_of_patience = not awaited and waited_s >= self._settings.patience_s
        no_budget = run.attempt > 0 and not self._budget.allows
        if not out_of_patience and (no_budget or run.seen_version == self.fleet.version):
            return
        request, replicas = run.ticket.request, self.fleet.pool(now)
        context = foreseen.context if foreseen else self.experience.context(run, now)
        try:
            decision = foreseen or self._decide(request, replicas, context)
        except NoReplica as error:
            run.seen_version = self.fleet.version
            self.fleet.await_place(full_sites(replicas, context))
            hopeless = not self._may_wait(now) and not may_come(request, replicas, context)
            if out_of_patience or (hopeless and not awaited):
                told = self.arrivals.told_in(error, request, context, now)
                yield from self._end(run, now, run.last_error if run.num_tokens else told)
            return
        if run.in_line:
            if (turn := self.line.turn(run, decision, now)) is None:
                return
            decision = turn
        chosen = decision.chosen
        paused = chosen.instance in run.tried and now < run.retry_at
        if no_budget or paused:
            if out_of_patience:
                yield from self._end(run, now, run.last_error)
            return
        offer = run.ticket.offers[chosen.site]
        if offer.allocation != run.held_allocation or offer.max_charge_usu > run.held_usu:
            run.moving_to = decision.bare()
            yield MoveHold(
                run_id=request.id,
                allocation=str(offer.allocation),
                amount_usu=offer.max_charge_usu,
            )
        else:
            yield from self._send(run, decision, now)

    def _awaits(self, run: Progress, now: float) -> bool:
        """Return whether a run may wait to its deadline, because a replica is on its way."""
        if run.num_tokens or not self.arrivals:
            return False
        return self.arrivals.in_time(run.ticket.request, self.experience.context(run, now), now)

    def _on_hold_moved(self, run: Progress, now: float) -> Instructions:
        if (placement := run.moving_to) is None:
            return
        offer = run.ticket.offers[placement.site]
        run.held_allocation, run.held_usu = str(offer.allocation), offer.max_charge_usu
        run.moving_to, run.seen_version = None, -1
        # The fleet may have changed meanwhile, so the choice is made again, on the hold as it is.
        yield from self._place(run, now)

    def _send(self, run: Progress, decision: Decision, now: float) -> Instructions:
        placement = decision.placement()
        if run.num_sent:
            self._budget.withdraw()
        run.attempt = run.num_sent = run.num_sent + 1
        run.instance, run.placement = placement.instance, placement
        run.state, run.sent_at, run.attempt_first_at = RunState.DISPATCHED, now, None
        run.num_before = run.num_tokens
        run.predicted = decision.chosen
        run.silent_until = self.experience.silent_until(run, decision.chosen, now)
        self._races.expect(run, decision, now)
        self.fleet.assign(now, placement.instance, run.ticket.request.id)
        self.line.began(run)
        yield Emit(
            run_id=run.ticket.request.id,
            event=Placed(
                attempt=run.attempt,
                placement=placement,
                because=run.last_error.message if run.last_error else None,
            ),
        )
        yield SendTask(
            run_id=run.ticket.request.id,
            instance=placement.instance,
            task=self._tasks.get(run, run.attempt, now),
        )

    def _may_wait(self, now: float) -> bool:
        return now - self._started_at < self._settings.patience_s

    # ---- second attempts ------------------------------------------------------------------------

    def _hedge(self, run: Progress, now: float) -> Instructions:
        """Send a second attempt beside a silent first, if the budget allows and a replica suits."""
        run.hedge_at = math.inf
        if run.num_sent >= self._settings.max_attempts or not self._budget.is_plenty:
            return
        request, context = run.ticket.request, self.experience.context(run, now)
        try:
            decision = self._decide(request, self.fleet.pool(now), context)
        except NoReplica:
            return
        if suits(request, decision.chosen, context):
            self._budget.withdraw()
            task = self._tasks.get(run, run.num_sent + 1, now)
            silent_until = self.experience.silent_until(run, decision.chosen, now)
            yield from self._races.start(run, now, decision, task, silent_until)

    # ---- attempts -------------------------------------------------------------------------------

    def _live(self, run_id: str, attempt: int) -> Progress | None:
        """Return the run if this attempt of it is live; what older ones say is late."""
        run = self.runs.get(run_id)
        return run if run and run.instance is not None and run.attempt == attempt else None

    def _on_next_token(self, event: AttemptEvent) -> list[Instruction] | None:
        """Take a run's next token, as nearly all events are; it frees no row. Else ``None``."""
        token, run = event.event, self._live(event.run_id, event.attempt)
        if run is None or run.hedge is not None or not isinstance(token, Token):
            return None
        if run.hear(token, event.now) is not None:
            return None
        return [Emit(run_id=event.run_id, event=token)] if run.cancel_until is None else []

    def _on_attempt_event(self, event: AttemptEvent) -> Instructions:
        run, now = self.runs.get(event.run_id), event.now
        if run is not None and run.hedge is not None:
            yield from self._races.judge(run, event)
        if (run := self._live(event.run_id, event.attempt)) is None:
            return
        match event.event:
            case Token() | Saves() | Embedding() as said:
                if (violation := run.hear(said, now)) is not None:
                    yield from self._on_violation(run, now, violation)
                elif run.cancel_until is None:
                    yield Emit(run_id=event.run_id, event=said)
            case Accepted(prompt_tokens=prompt_tokens):
                run.state = RunState.RUNNING
                if run.ticket.bounds is not None:
                    run.silent_until = None  # It may compute for long before it says anything.
                run.accept(prompt_tokens)
            case PromptScored() as scored:
                if run.take_scores() and run.cancel_until is None:
                    yield Emit(run_id=event.run_id, event=scored)
            case Finished() as finished:
                yield from self._on_finished(run, now, finished)
            case Failed() as failed:
                yield from self._on_failed(run, now, failed)

    def _on_finished(self, run: Progress, now: float, finished: Finished) -> Instructions:
        is_program = run.ticket.bounds is not None
        has_all = is_program or len(finished.finish_reasons) == len(run.finishes)
        if not (run.complete and has_all):
            yield from self._on_violation(run, now, "the end of a task that is not done")
            return
        self.experience.observe(run, now, finished)
        if not is_program:
            run.finishes = list(finished.finish_reasons)
        if run.cancel_until is None:
            yield from self._complete(run, now, finished.usage)
        else:
            yield from self._end(run, now, RequestCancelled(), finished.usage)

    def _on_failed(self, run: Progress, now: float, failed: Failed) -> Instructions:
        error = failed.failure.to_error()
        if run.cancel_until is not None:
            yield from self._end(run, now, RequestCancelled(), failed.usage)
        elif (violation := not_its_to_say(failed)) is not None:
            yield from self._on_violation(run, now, violation)
        elif error.retryable or isinstance(error, RequestCancelled):
            yield from self._on_lost(run, now, error)
        else:
            if isinstance(error, DeadlineExceeded):
                error = too_late(run)
            usage = failed.usage if run.delivered else None
            yield from self._end(run, now, error, usage)

    def _on_violation(self, run: Progress, now: float, reason: str) -> Instructions:
        error = ProtocolViolation(peer=f"The instance {run.instance!r}", reason=reason)
        yield AbandonAttempt(run_id=run.ticket.request.id, attempt=run.attempt)
        yield from self._on_lost(run, now, error)

    def _on_lost(self, run: Progress, now: float, error: FabricError) -> Instructions:
        """The attempt is over without a result: go on elsewhere if that is allowed."""
        instance = run.instance or ""
        self.fleet.failed(now, instance)
        if run.hedge is not None:
            yield from self._races.promote(run, error.message)
            return
        self._detach(run)
        if run.cancel_until is not None:
            yield from self._end(run, now, RequestCancelled())
        elif run.complete and (run.num_tokens or run.embedded or run.has_saves):
            yield from self._complete(run, now, None)
        elif (run.num_tokens or run.has_saves) and not run.resumable:
            yield from self._end(run, now, broken(run, instance, error))
        elif run.num_sent >= self._settings.max_attempts:
            yield from self._end(run, now, error)
        else:
            run.last_error = error
            run.tried.add(instance)
            run.state, run.waiting_since, run.seen_version = RunState.QUEUED, now, -1
            run.retry_at = now + backoff_s(run)
            yield from self._place(run, now)

    # ---- time and the client --------------------------------------------------------------------

    def _on_tick(self, now: float) -> Instructions:
        self.fleet.tick(now)
        self.arrivals.tick(now)
        self._budget.refill(now)
        for run in list(self.runs.values()):
            run_id = run.ticket.request.id
            if run.cancel_until is not None:
                if now >= run.cancel_until:
                    yield AbandonAttempt(run_id=run_id, attempt=run.attempt)
                    yield from self._end(run, now, RequestCancelled())
            elif now >= run.deadline_at:
                if run.instance is not None:
                    yield AbandonAttempt(run_id=run_id, attempt=run.attempt)
                yield from self._end(run, now, too_late(run))
            elif run.instance is None:
                if run.moving_to is None and not run.in_line:
                    yield from self._place(run, now)
            elif run.silent_until is not None and now >= run.silent_until:
                silence_s = round(now - run.sent_at, 1)
                yield AbandonAttempt(run_id=run_id, attempt=run.attempt)
                timeout = FirstTokenTimeout(instance=run.instance, timeout_s=silence_s)
                yield from self._on_lost(run, now, timeout)
            elif now >= run.hedge_at:
                yield from self._hedge(run, now)
        yield from self._take_turns(now, everyone=True)

    def _on_client_gone(self, run: Progress, now: float) -> Instructions:
        if run.instance is None:
            yield from self._end(run, now, RequestCancelled())
        elif run.cancel_until is None:
            yield from self._races.drop(run)
            run.cancel_until = now + self._settings.cancel_grace_s
            yield CancelAttempt(
                run_id=run.ticket.request.id, instance=run.instance, attempt=run.attempt
            )

    # ---- the end --------------------------------------------------------------------------------

    def _complete(self, run: Progress, now: float, reported: Usage | None) -> Instructions:
        outcome = get_outcome(run, now, RunState.COMPLETED, reported)
        yield from self._close(run, outcome)
        yield Emit(run_id=run.ticket.request.id, event=get_completed(run, outcome))

    def _end(
        self, run: Progress, now: float, error: FabricError | None, reported: Usage | None = None
    ) -> Instructions:
        assert error is not None
        cancelled = isinstance(error, RequestCancelled)
        state = RunState.CANCELLED if cancelled else RunState.FAILED
        outcome = get_outcome(run, now, state, reported, error.code)
        yield from self._close(run, outcome)
        yield Emit(run_id=run.ticket.request.id, event=get_failed(run, outcome, error))

    def _close(self, run: Progress, outcome: Outcome) -> Instructions:
        """Forget the run and its attempts, and settle or return its hold."""
        yield from self._races.drop(run)
        self._detach(run)
        self.line.ended(run, outcome.usage, outcome.total_s)
        run.state = outcome.state
        del self.runs[run.ticket.request.id]
        yield get_closing(run, outcome)

    def _detach(self, run: Progress) -> None:
        if run.instance is not None:
            self._release(run.instance, run.ticket.request.id)
            run.instance, run.silent_until = None, None

    def _release(self, instance: str, run_id: str) -> None:
        self.fleet.release(instance, run_id)
        self.line.freed(instance, run_id)
