"""A second attempt beside one that has said nothing for too long."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fabric.broker.hedge import Waits
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    AbandonAttempt,
    CancelAttempt,
    ClientGone,
    Instruction,
    SendTask,
    Settle,
)
from fabric.errors import ContextExceeded, EngineStopped
from fabric.messages import Placed, RunCompleted, RunFailed, Token
from fabric.testing.broker_rig import Rig, admit, offer, only

NUM_SEEN = 5
PATIENCE_S = 0.5


def make_rig(*sites: str, **changes: Any) -> Rig:
    """Return a rig in which every replica has answered often enough to be known, in 0.1 s."""
    rig = Rig(*sites, hedge_samples=NUM_SEEN, hedge_min_s=PATIENCE_S, **changes)
    for site in sites:
        for number in range(NUM_SEEN):
            sent = admit(rig, run_id=f"known_{site}_{number}", offers=[offer(site)])
            rig.tick(0.1)
            rig.token(sent, 0, "stop")
            rig.finish(sent, 1)
    rig.done.clear()
    return rig


def hedge(rig: Rig, **changes: Any) -> tuple[SendTask, SendTask]:
    """Admit a request, wait in vain, and return its two attempts."""
    first = admit(rig, **changes)
    assert not [one for one in rig.tick(PATIENCE_S - 0.1) if isinstance(one, SendTask)]
    second = only(rig.tick(0.2), SendTask)
    return first, second


def sends(out: list[Instruction]) -> list[SendTask]:
    return [one for one in out if isinstance(one, SendTask)]


def counted(rig: Rig) -> dict[str, int]:
    return {one.hello.instance: len(one.in_flight) for one in rig.state.fleet}


def test_a_second_attempt_goes_elsewhere_and_wins_with_its_first_token() -> None:
    rig = make_rig("alpha", "beta")
    first, second = hedge(rig)
    assert {first.instance, second.instance} == {"alpha-1", "beta-1"}
    assert (first.task.attempt, second.task.attempt) == (1, 2)
    assert second.task.prefix == ()
    out = rig.token(second, 0)
    assert only(out, AbandonAttempt).attempt == 1
    placed = rig.emitted(Placed)[-1]
    assert (placed.attempt, placed.placement.instance) == (2, second.instance)
    assert placed.because is not None
    assert "had said nothing for 0.6 s" in placed.because
    # What the loser says now is late.
    assert rig.token(first, 0) == []
    rig.token(second, 1, "stop")
    rig.finish(second, 2)
    assert [token.position for token in rig.emitted(Token)] == [0, 1]
    completed = only_completed(rig)
    assert (completed.instance, completed.attempts) == (second.instance, 2)
    assert counted(rig) == {"alpha-1": 0, "beta-1": 0}


def test_the_winner_alone_is_charged_once_at_its_own_price() -> None:
    rig = make_rig("alpha", "beta")
    first, second = hedge(rig)
    rig.accept(second, prompt_tokens=3)
    rig.token(second, 0, "stop")
    rig.finish(second, 1)
    settle = only(rig.all(Settle), Settle)
    output_usu = {"alpha": 10, "beta": 20}[settle.site]
    assert settle.site == second.instance.removesuffix("-1")
    assert settle.outcome.charge_usu == 3 + output_usu
    rig.finish(first, 1)
    assert len(rig.all(Settle)) == 1


def test_the_first_attempt_may_still_win_and_the_client_hears_of_no_other() -> None:
    rig = make_rig("alpha", "beta")
    first, second = hedge(rig)
    out = rig.token(first, 0, "stop")
    assert only(out, AbandonAttempt).attempt == 2
    assert rig.token(second, 0, "stop") == []
    rig.finish(first, 1)
    assert [placed.attempt for placed in rig.emitted(Placed)] == [1]
    assert only_completed(rig).instance == first.instance
    assert counted(rig) == {"alpha-1": 0, "beta-1": 0}


def test_a_second_attempt_that_fails_leaves_the_first_alone() -> None:
    rig = make_rig("alpha", "beta")
    first, second = hedge(rig)
    assert rig.fail(second, EngineStopped(reason="x")) == []
    rig.token(first, 0, "stop")
    rig.finish(first, 1)
    assert only_completed(rig).instance == first.instance


def test_a_first_attempt_that_is_lost_leaves_the_second_to_go_on() -> None:
    rig = make_rig("alpha", "beta")
    first, second = hedge(rig)
    assert not sends(rig.lose(first))
    assert rig.emitted(Placed)[-1].attempt == 2
    rig.token(second, 0, "stop")
    rig.finish(second, 1)
    assert only_completed(rig).attempts == 2


def test_after_both_are_lost_a_third_has_a_number_of_its_own() -> None:
    rig = make_rig("alpha", "beta", "gamma", max_attempts=3)
    offers = [offer(site) for site in ("alpha", "beta", "gamma")]
    first, second = hedge(rig, offers=offers)
    rig.lose(second)
    third = only(rig.lose(first), SendTask)
    assert third.task.attempt == 3
    assert {first.instance, second.instance, third.instance} == {"alpha-1", "beta-1", "gamma-1"}
    rig.lose(third)
    assert rig.emitted(RunFailed)


def test_a_refusal_by_the_first_ends_both() -> None:
    rig = make_rig("alpha", "beta")
    first, _ = hedge(rig)
    out = rig.fail(first, ContextExceeded(prompt_tokens=99, max_tokens=4, context_tokens=64))
    assert only(out, AbandonAttempt).attempt == 2
    assert rig.failure().code == "context_length_exceeded"
    assert counted(rig) == {"alpha-1": 0, "beta-1": 0}


def test_a_client_that_leaves_ends_both() -> None:
    rig = make_rig("alpha", "beta")
    first, _ = hedge(rig)
    out = rig.feed(ClientGone(now=rig.now, run_id=first.run_id))
    assert only(out, AbandonAttempt).attempt == 2
    assert only(out, CancelAttempt).attempt == 1
    rig.tick(3.0)
    assert counted(rig) == {"alpha-1": 0, "beta-1": 0}
    assert not rig.state.runs


def test_the_deadline_ends_both() -> None:
    rig = make_rig("alpha", "beta")
    hedge(rig, deadline_s=2.0)
    out = rig.tick(5.0)
    assert sorted(one.attempt for one in out if isinstance(one, AbandonAttempt)) == [1, 2]
    assert rig.failure().code == "deadline_exceeded"


def test_what_has_begun_to_answer_gets_no_second_attempt() -> None:
    rig = make_rig("alpha", "beta")
    sent = admit(rig)
    rig.token(sent, 0)
    assert not sends(rig.tick(20.0))


def test_nothing_is_taken_for_slow_before_enough_were_seen() -> None:
    rig = Rig("alpha", "beta", hedge_samples=NUM_SEEN, hedge_min_s=PATIENCE_S)
    admit(rig)
    assert not sends(rig.tick(20.0))


def test_no_second_attempt_goes_where_nothing_else_is_or_another_would_pay() -> None:
    alone = make_rig("alpha")
    admit(alone, sites=("alpha",))
    assert not sends(alone.tick(1.0))
    rig = make_rig("alpha", "beta")
    first = admit(rig, offers=[offer("alpha"), offer("beta", allocation="allocation:other:beta")])
    assert first.instance == "alpha-1"
    assert not sends(rig.tick(1.0))


def test_no_second_attempt_brings_the_data_again() -> None:
    rig = make_rig("alpha", "beta")
    assert admit(rig, data_site="alpha", data_bytes=10**9).instance == "alpha-1"
    assert not sends(rig.tick(1.0))


def test_second_attempts_leave_half_of_the_retry_budget() -> None:
    rig = make_rig("alpha", "beta", retry_burst=8.0, retry_ratio=0.0, retry_min_per_s=0.0)
    rig.join("beta", "beta-2")
    rig.join("beta", "beta-3")
    for number in range(8):
        admit(rig, run_id=f"run_{number}")
    assert len(sends(rig.tick(1.0))) == 4
    assert not sends(rig.tick(1.0))


def test_a_replica_that_hangs_is_put_out_though_every_request_is_rescued() -> None:
    rig = make_rig("alpha", "beta", eject_after=3, eject_s=60.0)
    offers = [offer("alpha"), offer("beta", expected_charge_usu=20_000)]
    for number in range(6):
        sent = admit(rig, run_id=f"run_{number}", offers=offers)
        if sent.instance == "alpha-1":
            rig.tick(PATIENCE_S + 0.1)
            attempts = [one for one in sends(rig.done) if one.run_id == sent.run_id]
            sent = attempts[-1]
        assert sent.instance == "beta-1"
        rig.token(sent, 0, "stop")
        rig.finish(sent, 1)
    alpha = rig.state.fleet.get("alpha-1")
    assert alpha is not None
    assert alpha.ejected(rig.now)
    assert len(rig.emitted(RunCompleted)) == 6


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_patience_is_a_quantile_of_what_was_waited(quantile: float) -> None:
    waits = Waits(BrokerSettings(hedge_quantile=quantile, hedge_samples=100, hedge_min_s=0.0))
    drawn = np.random.default_rng(1).lognormal(size=100)
    for waited_s in drawn:
        waits.observe(waited_s=float(waited_s), expected_s=0.5)
    expected = np.quantile(drawn / 0.5, quantile, method="lower")
    assert waits.patience_s(2.0) == pytest.approx(2.0 * expected)


def test_a_quantile_of_one_sends_no_second_attempt() -> None:
    waits = Waits(BrokerSettings(hedge_quantile=1.0, hedge_samples=1))
    waits.observe(waited_s=1.0, expected_s=1.0)
    assert waits.patience_s(1.0) == math.inf


def only_completed(rig: Rig) -> RunCompleted:
    [completed] = rig.emitted(RunCompleted)
    return completed
