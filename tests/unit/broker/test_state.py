"""The rules of a run's life, one by one: events in, instructions out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

import pytest

from fabric.broker.select import Offer
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    AbandonAttempt,
    Admitted,
    AttemptEvent,
    AttemptLost,
    CancelAttempt,
    ClientGone,
    Emit,
    HoldMoved,
    HoldRefused,
    Instruction,
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
from fabric.errors import (
    ContextExceeded,
    EngineStopped,
    FabricError,
    RequestCancelled,
    SessionLost,
)
from fabric.ledger import Rate
from fabric.messages import (
    Accepted,
    Event,
    Failed,
    Failure,
    Finished,
    Hello,
    Limits,
    Load,
    Placed,
    PromptScored,
    Request,
    RunCompleted,
    RunFailed,
    RunState,
    Sampling,
    ScoredToken,
    TextInput,
    Token,
    Usage,
)
from fabric.messages.events import FinishReason

DIGEST = "sha256:aa"
LATE = 1_000.0
"""When the tests begin: long after the hub came up, so that no replica is expected any more."""
GENERAL = "allocation:astro:*"
T = TypeVar("T")


def offer(site: str, **changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "site": site,
        "allocation": GENERAL,
        "available_usu": 10_000,
        "max_charge_usu": 500,
        "expected_charge_usu": 10,
    }
    return Offer(**{**fields, **changes})


def rate(site: str, output_usu: int) -> Rate:
    return Rate(
        model="*",
        site=site,
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        prompt_usu=Decimal(1),
        cached_prompt_usu=Decimal(0),
        output_usu=Decimal(output_usu),
    )


def make_ticket(
    run_id: str = "run_1",
    *,
    sampling: Sampling | None = None,
    offers: Sequence[Offer] = (),
    project: str = "astro",
    **changes: Any,
) -> Ticket:
    offers = offers or (offer("alpha"), offer("beta"))
    sampling = sampling or Sampling(max_tokens=4, temperature=0.0)
    request = Request(
        id=run_id, model="smol", input=TextInput(text="Why?"), sampling=sampling, **changes
    )
    return Ticket(
        request=request,
        project=project,
        key_id="key_1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        model="smol@1",
        digest=DIGEST,
        offers={one.site: one for one in offers},
        rates={one.site: rate(one.site, 20 if one.site == "beta" else 10) for one in offers},
        held_allocation=GENERAL,
        held_usu=500,
        prompt_tokens_bound=5,
        max_output_tokens=4,
    )


class Rig:
    """A state with a clock, and all the instructions it has given."""

    def __init__(self, *sites: str, started_at: float = 0.0, **settings: Any) -> None:
        self.state = BrokerState(BrokerSettings(**settings), started_at=started_at)
        self.now = LATE
        self.done: list[Instruction] = []
        for site in sites:
            self.join(site)

    def feed(self, event: StateEvent) -> list[Instruction]:
        out = self.state.handle(event)
        self.done += out
        return out

    def join(self, site: str, instance: str | None = None, **changes: Any) -> list[Instruction]:
        hello = Hello(
            instance=instance or f"{site}-1",
            site=site,
            model="smol@1",
            digest=changes.pop("digest", DIGEST),
            limits=Limits(context_tokens=64, max_rows=4, cache_tokens=256),
            dtype="float32",
            engine="test",
        )
        return self.feed(
            ReplicaJoined(
                now=self.now, hello=hello, streams=changes.pop("streams", True), joined_at=0.0
            )
        )

    def leave(self, instance: str, *, lost: bool = True) -> list[Instruction]:
        return self.feed(ReplicaLeft(now=self.now, instance=instance, lost=lost))

    def admit(self, run_id: str = "run_1", **changes: Any) -> SendTask | None:
        ticket = make_ticket(run_id, **changes)
        out = self.feed(Admitted(now=self.now, started_at=self.now, ticket=ticket))
        return next((one for one in out if isinstance(one, SendTask)), None)

    def tick(self, seconds: float = 0.0) -> list[Instruction]:
        self.now += seconds
        return self.feed(Tick(now=self.now))

    def say(self, sent: SendTask, event: Event) -> list[Instruction]:
        return self.feed(
            AttemptEvent(now=self.now, run_id=sent.run_id, attempt=sent.task.attempt, event=event)
        )

    def accept(self, sent: SendTask, prompt_tokens: int = 3) -> None:
        self.say(sent, Accepted(**key(sent), prompt_tokens=prompt_tokens))

    def token(
        self, sent: SendTask, position: int, finish: FinishReason | None = None, choice: int = 0
    ) -> list[Instruction]:
        token = Token(
            **key(sent),
            choice=choice,
            position=position,
            token_id=100 + position,
            text=f"t{position}",
            finish_reason=finish,
        )
        return self.say(sent, token)

    def finish(self, sent: SendTask, num_tokens: int, **usage: Any) -> list[Instruction]:
        fields: dict[str, Any] = {"prompt_tokens": 3, "output_tokens": num_tokens, **usage}
        return self.say(
            sent, Finished(**key(sent), finish_reasons=("length",), usage=Usage(**fields))
        )

    def fail(self, sent: SendTask, error: FabricError, **usage: Any) -> list[Instruction]:
        failed = Failed(**key(sent), failure=Failure.of(error), usage=Usage(**usage))
        return self.say(sent, failed)

    def lose(self, sent: SendTask) -> list[Instruction]:
        error = SessionLost(instance=sent.instance, reason="the cable was pulled")
        return self.feed(
            AttemptLost(now=self.now, run_id=sent.run_id, attempt=sent.task.attempt, error=error)
        )

    def all(self, kind: type[T]) -> list[T]:
        return [one for one in self.done if isinstance(one, kind)]

    def emitted(self, kind: type[T]) -> list[T]:
        return [one.event for one in self.all(Emit) if isinstance(one.event, kind)]

    def failure(self) -> Failure:
        [failed] = self.emitted(RunFailed)
        return failed.failure


def key(sent: SendTask) -> dict[str, Any]:
    return {"task_id": sent.run_id, "attempt": sent.task.attempt}


def only(out: Sequence[Instruction], kind: type[T]) -> T:
    [found] = [one for one in out if isinstance(one, kind)]
    return found


def admit(rig: Rig, **changes: Any) -> SendTask:
    sent = rig.admit(**changes)
    assert sent is not None
    rig.accept(sent)
    return sent


SEEDLESS = Sampling(max_tokens=4, temperature=0.7)


def test_a_run_completes_and_settles_once_before_its_client_hears_of_it() -> None:
    rig = Rig("alpha")
    sent = admit(rig)
    for position in range(4):
        rig.token(sent, position, "length" if position == 3 else None)
    rig.now += 1.0
    settle, emit = rig.finish(sent, 4)
    assert isinstance(settle, Settle)
    assert isinstance(emit, Emit)
    assert settle.site == "alpha"
    assert settle.outcome.state is RunState.COMPLETED
    [completed] = rig.emitted(RunCompleted)
    assert completed.usage == Usage(prompt_tokens=3, output_tokens=4)
    assert completed.charge_usu == settle.outcome.charge_usu == 3 * 1 + 4 * 10
    assert completed.total_s == 1.0
    assert [token.position for token in rig.emitted(Token)] == [0, 1, 2, 3]
    assert not rig.state.runs
    assert rig.state.fleet.views()[0].num_in_flight == 0


def test_a_replica_slower_than_predicted_is_predicted_slower() -> None:
    rig = Rig("alpha")
    for number in range(30):
        sent = admit(rig, run_id=f"run_{number}")
        rig.now += 0.5
        rig.token(sent, 0)
        for position in range(1, 4):
            rig.token(sent, position, "length" if position == 3 else None)
        rig.now += 5.0
        rig.finish(sent, 4)
    placements = [one.placement.candidates[0] for one in rig.emitted(Placed)]
    assert placements[0].correction == 1.0
    assert placements[-1].correction > 2.0
    first, last = placements[0].cost_s["service"], placements[-1].cost_s["service"]
    assert last > 2.0 * first


def test_a_start_or_a_transfer_says_nothing_of_a_replica() -> None:
    rig = Rig("alpha")
    rig.state.fleet.report_cold("alpha-1", 1.0, start_wait_s=5.0, load_s=5.0)
    for number, data in enumerate([{}, {"data_site": "beta", "data_bytes": 10}]):
        sent = admit(rig, run_id=f"run_{number}", **data)
        rig.now += 20.0
        for position in range(4):
            rig.token(sent, position, "length" if position == 3 else None)
        rig.finish(sent, 4)
        rig.state.fleet.report_cold("alpha-1", 0.0, start_wait_s=0.0, load_s=0.0)
    [after] = rig.state.fleet.snapshots(rig.now)
    assert (after.overhead_s, after.correction) == (0.0, 1.0)


def test_a_loss_before_the_first_token_goes_on_elsewhere() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig, sampling=SEEDLESS)
    again = only(rig.lose(sent), SendTask)
    assert {sent.instance, again.instance} == {"alpha-1", "beta-1"}
    assert again.task.attempt == 2
    assert again.task.prefix == ()
    placed = rig.emitted(Placed)
    assert [one.attempt for one in placed] == [1, 2]
    assert placed[0].because is None
    assert "cable was pulled" in (placed[1].because or "")


def test_a_greedy_stream_resumes_after_its_tokens_and_is_billed_once() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig)
    rig.token(sent, 0)
    rig.token(sent, 1)
    again = only(rig.lose(sent), SendTask)
    assert again.task.prefix == (100, 101)
    rig.accept(again, prompt_tokens=5)
    rig.token(again, 2)
    rig.token(again, 3, "length")
    rig.finish(again, 2, prompt_tokens=5)
    assert [token.position for token in rig.emitted(Token)] == [0, 1, 2, 3]
    [settle] = rig.all(Settle)
    assert settle.outcome.usage == Usage(prompt_tokens=3, output_tokens=4)
    price = {"alpha": 10, "beta": 20}[settle.site]
    assert settle.site == again.instance.removesuffix("-1")
    assert settle.outcome.charge_usu == 3 + 4 * price


@pytest.mark.parametrize(
    "sampling",
    [SEEDLESS, Sampling(max_tokens=4, temperature=0.0, n=2)],
    ids=["no seed", "two choices"],
)
def test_a_stream_that_cannot_go_on_exactly_is_broken_and_its_tokens_charged(
    sampling: Sampling,
) -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig, sampling=sampling)
    rig.token(sent, 0)
    out = rig.lose(sent)
    assert not [one for one in out if isinstance(one, SendTask)]
    assert rig.failure().code == "stream_broken"
    settle = only(out, Settle)
    assert settle.outcome.usage == Usage(prompt_tokens=3, output_tokens=1)
    assert settle.outcome.state is RunState.FAILED


def test_a_stream_lost_after_its_last_token_is_complete() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig, sampling=SEEDLESS)
    rig.token(sent, 0, "stop")
    rig.lose(sent)
    [completed] = rig.emitted(RunCompleted)
    assert completed.finish_reasons == ("stop",)
    assert completed.usage.output_tokens == 1


def test_no_request_is_tried_more_than_three_times() -> None:
    rig = Rig("alpha", "beta", "gamma", "delta")
    sites = ("alpha", "beta", "gamma", "delta")
    sent = rig.admit(offers=[offer(site) for site in sites])
    for _ in range(2):
        assert sent is not None
        sent = only(rig.lose(sent), SendTask)
    assert sent is not None
    rig.lose(sent)
    assert rig.failure().code == "session_lost"
    assert len(rig.all(SendTask)) == 3
    assert len(rig.all(Void)) == 1


def test_no_failover_crosses_to_another_digest() -> None:
    rig = Rig("alpha")
    rig.join("beta", digest="sha256:bb")
    sent = admit(rig)
    rig.lose(sent)
    rig.leave("alpha-1")
    rig.tick(11.0)
    assert len(rig.all(SendTask)) == 1
    assert rig.failure().code == "no_replica"


def test_what_an_older_attempt_says_late_is_ignored() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig)
    again = only(rig.lose(sent), SendTask)
    rig.accept(again)
    assert rig.token(sent, 0) == []
    assert rig.finish(sent, 4) == []
    assert rig.lose(sent) == []
    rig.token(again, 0, "stop")
    rig.finish(again, 1)
    assert rig.finish(again, 1) == []
    assert len(rig.all(Settle)) == 1


@pytest.mark.parametrize("error", [EngineStopped(reason="draining"), RequestCancelled()])
def test_a_failure_that_may_pass_elsewhere_is_retried(error: FabricError) -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig)
    assert only(rig.fail(sent, error), SendTask).instance != sent.instance


def test_a_failure_of_the_request_itself_reaches_the_client_unchanged_and_free() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig)
    error = ContextExceeded(prompt_tokens=99, max_tokens=4, context_tokens=64)
    out = rig.fail(sent, error, prompt_tokens=99)
    assert rig.failure() == Failure.of(error)
    assert only(out, Void)
    assert len(rig.all(SendTask)) == 1


def test_a_silent_replica_is_left_for_the_next() -> None:
    rig = Rig("alpha", "beta", first_token_timeout_s=20.0)
    sent = admit(rig)
    assert rig.tick(19.0) == []
    out = rig.tick(1.5)
    assert only(out, AbandonAttempt).attempt == 1
    assert only(out, SendTask).instance != sent.instance
    assert "sent nothing" in (rig.emitted(Placed)[1].because or "")


def test_the_first_token_ends_the_wait_for_it() -> None:
    rig = Rig("alpha", "beta", first_token_timeout_s=5.0)
    sent = admit(rig)
    rig.token(sent, 0)
    assert rig.tick(50.0) == []


def test_a_channel_without_streams_may_be_silent() -> None:
    rig = Rig(first_token_timeout_s=5.0)
    rig.join("alpha", streams=False)
    admit(rig)
    assert rig.tick(100.0) == []


def test_a_request_waits_for_a_lost_replica_to_come_back() -> None:
    rig = Rig("alpha")
    rig.leave("alpha-1")
    assert rig.admit() is None
    rig.tick(5.0)
    sent = only(rig.join("alpha"), SendTask)
    assert sent.task.attempt == 1
    assert sent.task.deadline_s == pytest.approx(295.0)


def test_patience_ends() -> None:
    rig = Rig("alpha", patience_s=10.0)
    rig.leave("alpha-1")
    rig.admit()
    assert rig.tick(9.9) == []
    out = rig.tick(0.2)
    assert only(out, Void)
    assert rig.failure().code == "no_replica"
    assert rig.failure().detail["reasons"] == {"alpha-1": "its session was lost and may come back"}


def test_nothing_is_waited_for_that_cannot_come() -> None:
    rig = Rig("alpha")
    rig.leave("alpha-1", lost=False)
    rig.admit()
    assert rig.failure().code == "no_replica"


def test_a_hub_that_just_started_expects_its_replicas() -> None:
    rig = Rig(started_at=LATE - 1.0)
    assert rig.admit() is None
    assert only(rig.join("alpha"), SendTask)


def test_the_deadline_ends_a_run_and_charges_what_was_delivered() -> None:
    rig = Rig("alpha")
    sent = admit(rig, deadline_s=20.0)
    rig.token(sent, 0)
    assert rig.tick(19.9) == []
    out = rig.tick(0.2)
    assert only(out, AbandonAttempt)
    assert only(out, Settle).outcome.charge_usu == 3 + 10
    assert rig.failure().code == "deadline_exceeded"


def test_the_deadline_ends_a_waiting_run_for_nothing() -> None:
    rig = Rig("alpha", patience_s=60.0)
    rig.leave("alpha-1")
    rig.admit(deadline_s=2.0)
    out = rig.tick(2.1)
    assert only(out, Void)
    assert rig.failure().detail == {"deadline_s": 2.0, "attempts": 0}


def test_a_client_that_leaves_pays_for_what_was_computed() -> None:
    rig = Rig("alpha")
    sent = admit(rig)
    rig.token(sent, 0)
    [cancel] = rig.feed(ClientGone(now=rig.now, run_id="run_1"))
    assert isinstance(cancel, CancelAttempt)
    assert rig.token(sent, 1) == []
    out = rig.fail(sent, RequestCancelled(), prompt_tokens=3, output_tokens=2, device_s=0.5)
    assert only(out, Settle).outcome.usage == Usage(prompt_tokens=3, output_tokens=2, device_s=0.5)
    assert only(out, Settle).outcome.state is RunState.CANCELLED
    assert rig.failure().code == "request_cancelled"


def test_a_cancelled_replica_that_says_nothing_is_not_waited_for() -> None:
    rig = Rig("alpha", cancel_grace_s=2.0)
    sent = admit(rig)
    rig.token(sent, 0)
    rig.feed(ClientGone(now=rig.now, run_id="run_1"))
    assert rig.tick(1.9) == []
    out = rig.tick(0.2)
    assert only(out, AbandonAttempt)
    assert only(out, Settle).outcome.usage == Usage(prompt_tokens=3, output_tokens=1)


def test_a_client_that_leaves_while_waiting_pays_nothing() -> None:
    rig = Rig("alpha")
    rig.leave("alpha-1")
    rig.admit()
    out = rig.feed(ClientGone(now=rig.now, run_id="run_1"))
    assert only(out, Void).outcome.state is RunState.CANCELLED


def test_inflated_usage_is_charged_as_what_arrived() -> None:
    rig = Rig("alpha")
    sent = rig.admit()
    assert sent is not None
    rig.accept(sent, prompt_tokens=1_000_000)
    rig.token(sent, 0, "stop")
    out = rig.finish(sent, 900, prompt_tokens=1_000_000, device_s=1e6)
    assert only(out, Settle).outcome.charge_usu == 5 * 1 + 1 * 10


def test_a_charge_never_exceeds_the_hold() -> None:
    rig = Rig("alpha")
    ticket = make_ticket(offers=[offer("alpha", max_charge_usu=12)])
    held = Ticket(**{name: getattr(ticket, name) for name in ticket.__slots__} | {"held_usu": 12})
    rig.feed(Admitted(now=rig.now, started_at=rig.now, ticket=held))
    [sent] = rig.all(SendTask)
    rig.accept(sent)
    rig.token(sent, 0)
    rig.token(sent, 1, "stop")
    assert only(rig.finish(sent, 2), Settle).outcome.charge_usu == 12


@pytest.mark.parametrize(
    "position_choice_after",
    [(1, 0, 0), (0, 1, 0), (4, 0, 4)],
    ids=["gap", "unknown choice", "more than asked"],
)
def test_tokens_that_do_not_belong_end_the_attempt(
    position_choice_after: tuple[int, int, int],
) -> None:
    position, choice, after = position_choice_after
    rig = Rig("alpha", "beta")
    sent = admit(rig)
    for earlier in range(after):
        rig.token(sent, earlier)
    out = rig.token(sent, position, choice=choice)
    assert only(out, AbandonAttempt).attempt == 1
    assert only(out, SendTask).instance != sent.instance
    assert len(rig.emitted(Token)) == after


def test_an_end_without_the_last_token_is_not_believed() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig)
    rig.token(sent, 0)
    out = rig.finish(sent, 1)
    assert only(out, AbandonAttempt)
    assert only(out, SendTask).task.prefix == (100,)


def test_a_prompt_is_scored_once_for_the_client() -> None:
    rig = Rig("alpha", "beta")
    sent = admit(rig, sampling=Sampling(max_tokens=4, prompt_logprobs=True))
    tokens = (ScoredToken(token_id=1, text="Why?", logprob=None),)
    rig.say(sent, PromptScored(**key(sent), tokens=tokens))
    again = only(rig.lose(sent), SendTask)
    assert rig.say(again, PromptScored(**key(again), tokens=tokens)) == []
    assert len(rig.emitted(PromptScored)) == 1


PRIVATE = (
    offer("alpha", allocation="allocation:astro:alpha", max_charge_usu=400),
    offer("beta", allocation="allocation:astro:beta", max_charge_usu=900),
)


def test_the_hold_moves_before_the_task_is_sent() -> None:
    rig = Rig("alpha")
    ticket_offers = [PRIVATE[0]]
    assert rig.admit(offers=ticket_offers) is None
    [move] = rig.all(MoveHold)
    assert (move.allocation, move.amount_usu) == ("allocation:astro:alpha", 400)
    assert only(rig.feed(HoldMoved(now=rig.now, run_id="run_1")), SendTask)


def test_a_site_whose_allocation_cannot_pay_is_passed_over() -> None:
    rig = Rig("alpha", "beta")
    rig.admit(offers=PRIVATE)
    [first] = rig.all(MoveHold)
    [second] = rig.feed(HoldRefused(now=rig.now, run_id="run_1"))
    assert isinstance(second, MoveHold)
    assert second.allocation != first.allocation
    rig.feed(HoldRefused(now=rig.now, run_id="run_1"))
    assert rig.failure().code == "no_replica"
    assert len(rig.all(Void)) == 1


def test_a_replica_lost_while_the_hold_moves_is_not_sent_to() -> None:
    rig = Rig("alpha")
    rig.admit(offers=PRIVATE)
    rig.leave("alpha-1")
    assert not [
        one for one in rig.feed(HoldMoved(now=rig.now, run_id="run_1")) if isinstance(one, SendTask)
    ]


def test_a_draining_replica_gets_nothing_new_and_finishes_what_it_has() -> None:
    rig = Rig("alpha")
    sent = admit(rig)
    rig.feed(ReplicaReported(now=rig.now, instance="alpha-1", load=Load(), draining=True))
    assert rig.admit("run_2") is None
    rig.token(sent, 0, "stop")
    rig.finish(sent, 1)
    assert rig.emitted(RunCompleted)


def test_failures_in_a_row_eject_a_replica_and_one_trial_brings_it_back() -> None:
    rig = Rig("alpha", "beta", eject_after=5, eject_s=10.0)
    for number in range(5):
        sent = rig.admit(f"run_{number}", sites=("alpha",), sampling=SEEDLESS)
        assert sent is not None
        rig.token(sent, 0)
        rig.lose(sent)
    assert rig.admit("run_a", sites=("alpha",)) is None
    out = rig.tick(10.1)
    trial = only(out, SendTask)
    assert trial.run_id == "run_a"
    # While the trial runs, nothing else is sent there.
    assert rig.admit("run_b", sites=("alpha",)) is None
    rig.token(trial, 0, "stop")
    rig.finish(trial, 1)
    assert only(rig.tick(0.1), SendTask).run_id == "run_b"


def test_a_failed_trial_puts_the_replica_out_again() -> None:
    rig = Rig("alpha", "beta", eject_after=1, eject_s=10.0)
    sent = rig.admit("run_0", sites=("alpha",), sampling=SEEDLESS)
    assert sent is not None
    rig.token(sent, 0)
    rig.lose(sent)
    rig.tick(10.1)
    trial = rig.admit("run_1", sites=("alpha",), sampling=SEEDLESS)
    assert trial is not None
    rig.token(trial, 0)
    rig.lose(trial)
    assert rig.admit("run_2", sites=("alpha",)) is None


def test_never_more_than_half_of_the_replicas_are_ejected() -> None:
    rig = Rig("alpha", "beta", eject_after=1)
    for site in ("alpha", "beta"):
        sent = rig.admit(f"run_{site}", sites=(site,), sampling=SEEDLESS)
        assert sent is not None
        rig.token(sent, 0)
        rig.lose(sent)
    assert rig.admit("run_a", sites=("alpha",)) is None
    assert rig.admit("run_b", sites=("beta",)) is not None


def test_a_single_replica_is_never_ejected() -> None:
    rig = Rig("alpha", eject_after=1)
    sent = admit(rig, sampling=SEEDLESS)
    rig.token(sent, 0)
    rig.lose(sent)
    assert rig.admit("run_2") is not None


def test_a_user_cannot_eject_a_replica_with_bad_requests() -> None:
    rig = Rig("alpha", "beta", eject_after=2)
    for number in range(6):
        sent = rig.admit(f"run_{number}", sites=("alpha",))
        assert sent is not None
        rig.fail(sent, ContextExceeded(prompt_tokens=99, max_tokens=4, context_tokens=64))


def test_the_only_replica_gets_a_pause_before_it_is_asked_again() -> None:
    rig = Rig("alpha")
    sent = admit(rig)
    out = rig.fail(sent, EngineStopped(reason="busy"))
    assert not [one for one in out if isinstance(one, SendTask)]
    again = only(rig.tick(0.5), SendTask)
    assert (again.instance, again.task.attempt) == ("alpha-1", 2)


def test_the_loss_of_a_site_fails_over_a_burst_at_once() -> None:
    rig = Rig("alpha")
    lost = [rig.admit(f"run_{number}") for number in range(32)]
    rig.join("beta")
    rig.leave("alpha-1")
    for sent in lost:
        assert sent is not None
        assert only(rig.lose(sent), SendTask).instance == "beta-1"


def test_a_retry_beyond_the_budget_waits_for_it() -> None:
    rig = Rig("alpha", "beta", retry_burst=1.0, retry_min_per_s=2.0, retry_ratio=0.0)
    first, second = (rig.admit(f"run_{number}", sites=("alpha",)) for number in range(2))
    rig.join("alpha", "alpha-2")
    assert first is not None
    assert second is not None
    rig.tick()
    assert only(rig.lose(first), SendTask)
    assert rig.lose(second) == []
    assert rig.tick(0.4) == []
    assert only(rig.tick(0.2), SendTask).run_id == second.run_id


def test_a_storm_of_failures_sends_at_most_a_fifth_more_than_was_asked() -> None:
    rig = Rig("alpha", "beta", retry_burst=32.0, retry_min_per_s=0.0)
    num_offered, num_sent = 3_000, 0
    todo: list[Instruction] = []
    for number in range(num_offered):
        sent = rig.admit(f"run_{number}")
        if sent is not None:
            todo.append(sent)
        todo += rig.tick(0.05)
        while todo:
            sent = todo.pop()
            if not isinstance(sent, SendTask):
                continue
            num_sent += 1
            if num_sent % 2:
                todo += rig.fail(sent, EngineStopped(reason="half of them fail"))
            else:
                rig.token(sent, 0, "stop")
                rig.finish(sent, 1)
        assert num_sent <= 1.2 * (number + 1) + 32
    assert num_sent > num_offered


def test_cached_prefixes_are_shared_within_a_project_only() -> None:
    rig = Rig("alpha")
    mine, again, other = (
        rig.admit(run_id, project=project)
        for run_id, project in (("run_1", "p"), ("run_2", "p"), ("run_3", "q"))
    )
    assert mine is not None
    assert again is not None
    assert other is not None
    assert mine.task.cache_salt == again.task.cache_salt != ""
    assert other.task.cache_salt != mine.task.cache_salt
