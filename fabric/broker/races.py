"""Two attempts of one run: the first word decides which goes on, and the other is abandoned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from fabric.broker.hedge import Hedge, Waits, first_answer_s, is_answer, may_hedge
from fabric.broker.progress import Progress
from fabric.broker.replicas import Fleet
from fabric.broker.select import Decision
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import AbandonAttempt, AttemptEvent, Emit, Instruction, SendTask
from fabric.messages import Accepted, Failed, Placed, Task

Instructions = Iterator[Instruction]

Release = Callable[[str, str], None]
"""Notes that an attempt of a run is over at an instance."""


class Races:
    """Second attempts, from when they are sent until one of the two is left."""

    def __init__(self, settings: BrokerSettings, fleet: Fleet, release: Release) -> None:
        self.waits = Waits(settings)
        self._fleet = fleet
        self._release = release

    def expect(self, run: Progress, decision: Decision, now: float) -> None:
        """Note when the first word is expected, and when its absence is worth a second attempt."""
        request, chosen = run.ticket.request, decision.chosen
        run.expected_s, run.hedge_at = 0.0, math.inf
        if run.silent_until is not None and not run.delivered and may_hedge(request, chosen):
            run.expected_s = first_answer_s(request, chosen, decision.context)
            run.hedge_at = now + self.waits.patience_s(run.expected_s)

    def start(
        self, run: Progress, now: float, decision: Decision, task: Task, silent_until: float | None
    ) -> Instructions:
        """Send a second attempt; the client hears of it only if it wins."""
        placement = decision.placement()
        run.num_sent = task.attempt
        run.hedge = Hedge(
            attempt=task.attempt,
            placement=placement,
            predicted=decision.chosen,
            sent_at=now,
            silent_until=silent_until,
        )
        self._fleet.assign(now, placement.instance, task.id)
        yield SendTask(run_id=task.id, instance=placement.instance, task=task)

    def judge(self, run: Progress, event: AttemptEvent) -> Instructions:
        """Take note of an event that may decide a race; its content is the state's affair."""
        hedge, said = run.hedge, event.event
        if hedge is None:
            return
        if event.attempt == run.attempt:
            if is_answer(said):
                yield from self.drop(run)
        elif event.attempt == hedge.attempt:
            if is_answer(said):
                self._missed(run, event.now)
                silent_s = event.now - run.sent_at
                because = (
                    f"{run.instance} had said nothing for {silent_s:.1f} s, and another answered"
                )
                yield AbandonAttempt(run_id=event.run_id, attempt=run.attempt)
                yield from self.promote(run, because)
            elif isinstance(said, Accepted):
                run.accept(said.prompt_tokens)
            elif isinstance(said, Failed):
                self.lose(run, event.now, its_fault=said.failure.to_error().retryable)

    def promote(self, run: Progress, because: str) -> Instructions:
        """Let the second attempt go on alone, in the place of the first."""
        hedge, run_id = run.hedge, run.ticket.request.id
        assert hedge is not None
        if run.instance is not None:
            self._release(run.instance, run_id)
            run.tried.add(run.instance)
        run.hedge = None
        run.attempt, run.instance, run.placement = hedge.attempt, hedge.instance, hedge.placement
        run.predicted, run.sent_at, run.expected_s = hedge.predicted, hedge.sent_at, 0.0
        run.silent_until = hedge.silent_until
        placed = Placed(attempt=hedge.attempt, placement=hedge.placement, because=because)
        yield Emit(run_id=run_id, event=placed)

    def lose(self, run: Progress, now: float, *, its_fault: bool = True) -> None:
        """The second attempt is over without a result; the first goes on."""
        if run.hedge is None:
            return
        if its_fault:
            self._fleet.failed(now, run.hedge.instance)
        self._release(run.hedge.instance, run.ticket.request.id)
        run.tried.add(run.hedge.instance)
        run.hedge = None

    def drop(self, run: Progress) -> Instructions:
        """Abandon the second attempt, if there is one."""
        if run.hedge is not None:
            run_id, hedge, run.hedge = run.ticket.request.id, run.hedge, None
            self._release(hedge.instance, run_id)
            yield AbandonAttempt(run_id=run_id, attempt=hedge.attempt)

    def _missed(self, run: Progress, now: float) -> None:
        """The first attempt lost: it counts as a failure, for a replica that hangs would otherwise
        never be put out, and as a wait at least so long."""
        self.waits.observe(now - run.sent_at, run.expected_s)
        if run.instance is not None:
            self._fleet.failed(now, run.instance)
