"""The rules of a run's life, one by one: events in, instructions out."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from fabric.broker.signals import (
    AbandonAttempt,
    Admitted,
    CancelAttempt,
    ClientGone,
    Emit,
    HoldMoved,
    HoldRefused,
    MoveHold,
    SendTask,
    Settle,
    Ticket,
    Void,
)
from fabric.errors import (
    ContextExceeded,
    EngineStopped,
    FabricError,
    InsufficientBalance,
    KeyInvalid,
    RequestCancelled,
)
from fabric.messages import (
    Failure,
    Placed,
    PromptScored,
    RunCompleted,
    RunState,
    Sampling,
    ScoredToken,
    Token,
    Usage,
)
from fabric.testing.broker_rig import (
    LATE,
    SEEDLESS,
    Rig,
    admit,
    key,
    make_ticket,
    offer,
    only,
)


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
    rig.now += 1.0
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
    rig.now += 1.0
    out = rig.finish(sent, 900, prompt_tokens=1_000_000, device_s=1e6, queue_s=1e6)
    assert only(out, Settle).outcome.charge_usu == 5 * 1 + 1 * 10
    assert only(out, Settle).outcome.usage.device_s == 1.0
    assert only(out, Settle).outcome.usage.queue_s == 1.0


@pytest.mark.parametrize(
    "error",
    [KeyInvalid(), InsufficientBalance(account="a", needed_usu=2, available_usu=1)],
    ids=lambda error: error.code,
)
def test_an_instance_does_not_speak_for_the_hub(error: FabricError) -> None:
    rig = Rig("alpha", "beta")
    rig.fail(admit(rig), error)
    rig.tick(1.0)
    assert len(rig.all(SendTask)) == 2


def test_cache_and_slot_are_charged_for_no_longer_than_the_request_could_keep_them() -> None:
    rig = Rig("alpha")
    ticket = make_ticket(offers=[offer("alpha", max_charge_usu=10**9)])
    dear = {"kv_block_usu": Decimal(1), "adapter_usu": Decimal(1)}
    prices = {site: replace(rate, **dear) for site, rate in ticket.rates.items()}
    held = replace(ticket, rates=prices, held_usu=10**9)
    rig.feed(Admitted(now=rig.now, started_at=rig.now, ticket=held))
    [sent] = rig.all(SendTask)
    rig.accept(sent)
    rig.token(sent, 0, "stop")
    outcome = only(rig.finish(sent, 1, kv_block_s=1e12, adapter_s=1e12), Settle).outcome
    assert outcome.usage.kv_block_s == held.kv_block_s_bound < 1e6
    assert outcome.usage.adapter_s == 0  # it asked for no adapter
    assert outcome.charge_usu < 10**6


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
