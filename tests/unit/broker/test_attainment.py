"""Promises are counted as kept and broken where users would say so."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.broker.attainment import Attained, Attainment
from fabric.broker.signals import Outcome
from fabric.broker.tiers import tier_of
from fabric.errors import InsufficientBalance, NoReplica, Overloaded
from fabric.messages import RunState, Usage
from fabric.testing.broker_rig import Rig, admit, make_ticket


def outcome(state: RunState = RunState.COMPLETED, **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "ticket": make_ticket(tier=changes.pop("tier", "interactive")),
        "state": state,
        "placement": None,
        "attempts": 1,
        "usage": Usage(),
        "charge_usu": 0,
        "first_token_s": 1.0,
        "total_s": 3.0,
        "failure_code": None,
        "first_s": 1.0,
        "token_s": 0.05,
    }
    return Outcome(**{**fields, **changes})


def find(seen: Attainment, now: float, tier: str, measure: str, window: str = "1h") -> Attained:
    [found] = [
        one
        for one in seen.report(now)
        if (one.tier, one.measure, one.window) == (tier, measure, window)
    ]
    return found


def test_what_is_in_time_and_what_is_not_is_counted() -> None:
    seen = Attainment()
    for first_s in (0.5, 1.9, 2.1, 1.0):
        seen.ended(0.0, outcome(first_s=first_s))
    first = find(seen, 1.0, "interactive", "first_token")
    assert (first.num_requests, first.attained, first.limit_s) == (4, 0.75, 2.0)
    assert find(seen, 1.0, "interactive", "answered").attained == 1.0


def test_a_budget_that_is_used_up_is_at_zero_and_then_below() -> None:
    seen = Attainment()
    for number in range(100):
        seen.ended(0.0, outcome(token_s=0.2 if number < 5 else 0.01))
    assert find(seen, 1.0, "interactive", "token").budget_left == pytest.approx(0.0)
    seen.ended(0.0, outcome(token_s=0.2))
    assert find(seen, 1.0, "interactive", "token").budget_left < 0


@pytest.mark.parametrize(
    ("state", "code", "num", "attained"),
    [
        (RunState.FAILED, "session_lost", 1, 0.0),
        (RunState.FAILED, "deadline_exceeded", 1, 0.0),
        (RunState.FAILED, "context_length_exceeded", 0, None),
        (RunState.CANCELLED, "request_cancelled", 0, None),
        (RunState.COMPLETED, None, 1, 1.0),
    ],
)
def test_only_the_fabrics_own_failures_break_a_promise(
    state: RunState, code: str | None, num: int, attained: float | None
) -> None:
    seen = Attainment()
    seen.ended(0.0, outcome(state, failure_code=code))
    answered = find(seen, 1.0, "interactive", "answered")
    assert (answered.num_requests, answered.attained) == (num, attained)


def test_a_refusal_because_of_load_breaks_a_promise_and_one_of_a_balance_does_not() -> None:
    seen, request = Attainment(), make_ticket().request
    busy = Overloaded(
        model="m",
        tier="standard",
        what="end",
        predicted_s=9.0,
        limit_s=1.0,
        retry_after_s=8.0,
    )
    seen.refused(0.0, request, busy)
    seen.refused(0.0, request, NoReplica(model="m", reasons={}))
    seen.refused(0.0, request, InsufficientBalance(account="a", needed_usu=2, available_usu=1))
    assert find(seen, 1.0, "standard", "answered").num_requests == 2


def test_windows_forget_what_is_older() -> None:
    seen = Attainment()
    seen.ended(0.0, outcome(first_s=9.0))
    seen.ended(1_000.0, outcome())
    assert find(seen, 1_001.0, "interactive", "first_token", "5m").attained == 1.0
    assert find(seen, 1_001.0, "interactive", "first_token", "1h").attained == 0.5
    assert find(seen, 10_000.0, "interactive", "first_token", "1h").attained is None
    assert find(seen, 10_000.0, "interactive", "first_token", "24h").num_requests == 2


def test_a_day_of_requests_takes_no_more_than_a_days_steps() -> None:
    seen = Attainment()
    ended = outcome()
    for number in range(30_000):
        seen.ended(number * 10.0, ended)
    assert find(seen, 300_000.0, "interactive", "answered", "24h").num_requests <= 8_642


def test_batch_work_is_on_time_or_not() -> None:
    seen = Attainment()
    seen.ended(0.0, outcome(tier="batch", total_s=299.0))
    seen.ended(0.0, outcome(tier="batch", total_s=301.0))
    measures = {one.measure for one in seen.report(1.0) if one.tier == "batch"}
    assert measures == {"answered"}
    assert find(seen, 1.0, "batch", "answered").attained == 0.5


def test_a_runs_times_are_those_its_client_saw() -> None:
    rig = Rig("alpha")
    sent = admit(rig)
    rig.now += 1.5
    rig.token(sent, 0)
    for position in (1, 2, 3):
        rig.now += 0.25
        rig.token(sent, position, "length" if position == 3 else None)
    [settle] = [one for one in rig.finish(sent, 4) if hasattr(one, "outcome")]
    assert settle.outcome.first_s == pytest.approx(1.5)
    assert settle.outcome.token_s == pytest.approx(0.25)
    assert tier_of(settle.outcome.ticket.request) == "standard"
