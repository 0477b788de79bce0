"""Who waits at the hub for a row, who is next, and what those who ask meanwhile are told."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.broker.select import Context
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import ClientGone, Instruction, SendTask, Void
from fabric.errors import Overloaded, TierNotHeld
from fabric.messages import Placed, Placement, Request, RunFailed, Sampling, TextInput
from fabric.testing.broker_rig import DIGEST, Rig, make_ticket, offer

ROWS = 4
"""Of each of the rig's replicas."""


def sent(out: list[Instruction]) -> list[str]:
    return [one.run_id for one in out if isinstance(one, SendTask)]


def fill(rig: Rig, num_runs: int = ROWS, **changes: Any) -> list[SendTask]:
    """Have requests take rows, and return their tasks."""
    tasks = [rig.admit(f"first_{number}", **changes) for number in range(num_runs)]
    for task in tasks:
        assert task is not None
        rig.accept(task)
    return [task for task in tasks if task is not None]


def end(rig: Rig, task: SendTask, *, in_s: float = 0.0, **usage: Any) -> list[Instruction]:
    """Have a task answered with four tokens."""
    rig.now += in_s
    for position in range(4):
        rig.token(task, position, "length" if position == 3 else None)
    return rig.finish(task, 4, **usage)


def foresee(
    rig: Rig, *, project: str = "astro", max_tokens: int = 4, **changes: Any
) -> Placement | None:
    """Do as admission does before it holds the charge."""
    others = changes.pop("offers", {})
    request = Request(
        model="smol",
        input=changes.pop("input", TextInput(text="Why?")),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
        **changes,
    )
    offers = {one: offer(one) for one in ("alpha", "beta")} | others
    context = Context(
        model="smol@1",
        digest=DIGEST,
        offers=offers,
        remaining_s=request.deadline_s,
        settings=BrokerSettings(),
    )
    return rig.state.foresee(rig.now, request, context, project=project)


def learn(rig: Rig, seconds: float = 1.0, site: str = "alpha") -> None:
    """Let a site's replica be seen to take so long for a request."""
    for number in range(8):
        task = rig.admit(f"known_{site}_{number}", sites=(site,))
        assert task is not None
        rig.accept(task)
        rig.now += seconds
        rig.token(task, 0)
        for position in range(1, 4):
            rig.token(task, position, "length" if position == 3 else None)
        rig.finish(task, 4)


def test_a_replica_has_as_many_attempts_as_rows_and_the_next_goes_when_one_ends() -> None:
    rig = Rig("alpha")
    tasks = fill(rig)
    assert [rig.admit(f"later_{number}") for number in range(3)] == [None] * 3
    assert sent(end(rig, tasks[0])) == ["later_0"]
    assert sent(end(rig, tasks[1])) == ["later_1"]
    assert sent(rig.tick(1.0)) == []


def test_a_few_more_than_have_rows_are_on_their_way() -> None:
    rig = Rig("alpha", rows_ahead=0.5)
    assert all(rig.admit(f"run_{number}") for number in range(ROWS + 2))
    assert rig.admit("waits") is None


def test_a_project_that_asks_for_little_does_not_wait_behind_one_that_asks_for_much() -> None:
    rig = Rig("alpha")
    tasks = fill(rig, project="greedy")
    for number in range(40):
        rig.admit(f"greedy_{number}", project="greedy")
    rig.admit("modest_0", project="modest")
    rig.admit("modest_1", project="modest")
    order = [run for task in tasks for run in sent(end(rig, task))]
    assert {"modest_0", "modest_1"} <= set(order)


def test_weights_divide_the_rows_between_projects() -> None:
    rig = Rig("alpha", project_weights={"large": 3.0})
    live = {task.run_id: task for task in fill(rig, project="other")}
    for number in range(40):
        rig.admit(f"large_{number}", project="large")
        rig.admit(f"small_{number}", project="small")
    order: list[str] = []
    while len(order) < 32:
        for one in end(rig, live.pop(next(iter(live)))):
            if isinstance(one, SendTask):
                rig.accept(one)
                live[one.run_id] = one
                order.append(one.run_id)
    assert 23 <= sum(run.startswith("large") for run in order) <= 25


def test_those_who_are_said_to_take_long_and_do_not_are_charged_what_they_took() -> None:
    rig = Rig("alpha")
    tasks = fill(rig, project="long", sampling=Sampling(max_tokens=128, temperature=0.0))
    for number in range(8):
        rig.admit(f"long_{number}", project="long")
        rig.admit(f"short_{number}", project="short")
    next_s = [sent(end(rig, task, in_s=0.1, device_s=0.001)) for task in tasks]
    assert sum(run.startswith("long") for [run] in next_s) >= 1


def test_what_a_site_lost_is_not_held_against_the_project() -> None:
    rig = Rig("alpha", max_attempts=1)
    for task in fill(rig, project="unlucky", sampling=Sampling(max_tokens=128, temperature=0.0)):
        rig.lose(task)
    tasks = [task for n in range(ROWS) if (task := rig.admit(f"other_{n}", project="other"))]
    for number in range(4):
        rig.admit(f"lucky_{number}", project="lucky")
        rig.admit(f"unlucky_{number}", project="unlucky")
    order = [run.partition("_")[0] for task in tasks for run in sent(end(rig, task))]
    assert order.count("unlucky") == order.count("lucky") == 2


def test_batch_work_leaves_rows_and_goes_by_its_deadline() -> None:
    rig = Rig("alpha")
    tasks = fill(rig, 3, tier="batch")
    assert rig.admit("late", tier="batch", deadline_s=900.0) is None
    assert rig.admit("soon", tier="batch", deadline_s=600.0) is None
    quick = rig.admit("quick", tier="interactive")
    assert quick is not None, "a row is kept for it"
    assert sent(end(rig, tasks[0])) == [], "three are busy still"
    assert sent(end(rig, tasks[1])) == ["soon"]
    assert sent(end(rig, tasks[2])) == ["late"]


def test_batch_work_waits_for_as_long_as_others_have_something() -> None:
    rig = Rig("alpha")
    tasks = fill(rig)
    rig.admit("batch", tier="batch")
    for number in range(3):
        rig.admit(f"standard_{number}")
    assert [sent(end(rig, task)) for task in tasks[:3]] == [
        ["standard_0"],
        ["standard_1"],
        ["standard_2"],
    ]
    assert sent(end(rig, tasks[3])) == []


def test_a_free_replica_that_costs_more_is_taken_once_waiting_costs_as_much() -> None:
    rig = Rig("alpha", "beta", explore=0.0)
    home = {"data_site": "alpha", "data_bytes": 3 * 10**8}
    tasks = fill(rig, **home)
    assert {task.instance for task in tasks} == {"alpha-1"}
    for number in range(5):
        rig.admit(f"few_{number}", **home)
    assert sent(rig.tick()) == [], "a short wait costs less than moving the data"
    for number in range(100):
        rig.admit(f"many_{number}", **home)
    away = [one for one in rig.tick() if isinstance(one, SendTask)]
    assert {one.instance for one in away} == {"beta-1"}
    placed = rig.emitted(Placed)[-1].placement
    assert placed.reason == "beta: it has a row free, and alpha-1 has none"


def test_who_must_wait_for_a_full_site_holds_up_nobody_else() -> None:
    rig = Rig("alpha", "beta")
    fill(rig, sites=("alpha",))
    assert rig.admit("stuck", sites=("alpha",)) is None
    assert rig.admit("behind", sites=("alpha",)) is None
    free = rig.admit("free")
    assert free is not None
    assert free.instance == "beta-1"


def test_those_who_wait_go_to_the_successor_of_a_lost_replica_in_their_order() -> None:
    rig = Rig("alpha", patience_s=10.0)
    for task in fill(rig):
        rig.token(task, 0)
    for number in range(3):
        rig.admit(f"later_{number}")
    rig.tick(30.0)
    rig.leave("alpha-1")
    assert rig.tick(5.0) == [], "their patience begins when the replica is gone"
    out = rig.join("beta")
    assert sent(out) == ["later_0", "later_1", "later_2"]


def test_those_who_wait_in_vain_are_told_so() -> None:
    rig = Rig("alpha", patience_s=10.0, lost_memory_s=1.0)
    fill(rig)
    rig.admit("later")
    rig.leave("alpha-1", lost=False)
    rig.tick(0.1)
    rig.tick(11.0)
    assert rig.failure().code == "no_replica"
    assert [one.run_id for one in rig.all(Void)] == ["later"]


def test_who_leaves_the_line_pays_nothing_and_the_next_takes_the_place() -> None:
    rig = Rig("alpha")
    tasks = fill(rig)
    rig.admit("gone")
    rig.admit("there")
    rig.feed(ClientGone(now=rig.now, run_id="gone"))
    [void] = rig.all(Void)
    assert (void.run_id, void.outcome.charge_usu) == ("gone", 0)
    assert sent(end(rig, tasks[0])) == ["there"]


def test_the_deadline_ends_who_waits() -> None:
    rig = Rig("alpha")
    fill(rig, deadline_s=900.0)
    rig.admit("late", deadline_s=5.0)
    rig.tick(6.0)
    [failed] = rig.emitted(RunFailed)
    assert (failed.run, failed.failure.code) == ("late", "deadline_exceeded")


def test_a_retry_goes_before_those_who_have_not_had_their_turn() -> None:
    rig = Rig("alpha", "beta")
    tasks = fill(rig, 2 * ROWS)
    rig.admit("waits")
    lost = next(task for task in tasks if task.instance == "alpha-1")
    assert sent(rig.lose(lost))[0] == lost.run_id


def test_without_a_line_a_replica_gets_all_at_once() -> None:
    rig = Rig("alpha", fair=False)
    assert all(rig.admit(f"run_{number}") for number in range(3 * ROWS))
    assert rig.state.line.waiting() == []


def test_a_channel_that_is_blind_to_free_rows_is_given_more_than_there_are() -> None:
    rig = Rig(rows_ahead=0.0)
    rig.join("alpha", streams=False)
    assert all(rig.admit(f"run_{number}") for number in range(4 * ROWS))
    assert rig.admit("waits") is None


# ---- admission by prediction ---------------------------------------------------------------------


def test_an_interactive_request_is_refused_where_its_first_token_would_be_late() -> None:
    rig = Rig("alpha")
    learn(rig)
    foresee(rig, tier="interactive")
    fill(rig)
    for number in range(12):
        rig.admit(f"later_{number}")
    with pytest.raises(Overloaded) as refused:
        foresee(rig, tier="interactive")
    assert refused.value.http_status == 503
    assert refused.value.detail["limit_s"] == 2.0
    assert 1.0 <= refused.value.detail["retry_after_s"] <= 30.0
    foresee(rig)


def test_no_request_is_admitted_that_would_end_after_its_deadline() -> None:
    rig = Rig("alpha")
    learn(rig)
    fill(rig, deadline_s=1000.0)
    for number in range(100):
        rig.admit(f"later_{number}", deadline_s=1000.0)
    with pytest.raises(Overloaded) as refused:
        foresee(rig, deadline_s=10.0)
    retry_after_s = refused.value.detail["retry_after_s"]
    assert isinstance(retry_after_s, float)
    foresee(rig, deadline_s=900.0)
    # What is said is kept: that much later, as fast as was measured, it is admitted.
    tasks = {one.run_id: one for one in rig.all(SendTask)}
    until = rig.now + retry_after_s
    while rig.now < until:
        live = [run for run in rig.state.runs.values() if run.instance is not None]
        rig.now += 1.0
        for run in live:
            task = tasks[run.ticket.request.id]
            rig.accept(task)
            end(rig, task)
        tasks = {one.run_id: one for one in rig.all(SendTask)}
    foresee(rig, deadline_s=10.0)


def test_those_who_are_admitted_together_count_each_other() -> None:
    rig = Rig("alpha")
    learn(rig)
    admitted = 0
    while admitted < 100:
        try:
            foresee(rig, tier="interactive")
        except Overloaded:
            break
        admitted += 1
    assert ROWS <= admitted <= 4 * ROWS


def test_a_tier_that_no_replica_holds_is_refused_for_good() -> None:
    rig = Rig("alpha")
    learn(rig, seconds=5.0)
    with pytest.raises(TierNotHeld) as refused:
        foresee(rig, tier="interactive")
    assert not refused.value.retryable
    assert "retry_after_s" not in refused.value.detail
    foresee(rig, tier="standard")


def test_a_request_goes_where_its_tier_is_held_though_that_is_dearer() -> None:
    rig = Rig("alpha", "beta", explore=0.0)
    learn(rig, seconds=5.0, site="alpha")
    learn(rig, seconds=0.5, site="beta")
    dear = {"beta": offer("beta", expected_charge_usu=20_000)}
    places = {tier: foresee(rig, tier=tier, offers=dear) for tier in ("standard", "interactive")}
    assert {tier: place and place.site for tier, place in places.items()} == {
        "standard": "alpha",
        "interactive": "beta",
    }


def test_free_rows_of_a_site_where_it_may_not_run_are_no_comfort() -> None:
    rig = Rig("alpha", "beta")
    learn(rig)
    fill(rig, sites=("alpha",))
    for number in range(20):
        rig.admit(f"later_{number}", sites=("alpha",))
    with pytest.raises(Overloaded):
        foresee(rig, deadline_s=5.0, sites=("alpha",))
    foresee(rig, deadline_s=5.0)


def test_batch_work_that_is_due_sooner_is_not_told_to_wait_for_what_is_due_later() -> None:
    rig = Rig("alpha")
    learn(rig)
    fill(rig, deadline_s=9_000.0)
    for number in range(100):
        rig.admit(f"later_{number}", tier="batch", deadline_s=9_000.0)
    foresee(rig, tier="batch", deadline_s=100.0)
    for number in range(200):
        rig.admit(f"sooner_{number}", tier="batch", deadline_s=90.0)
    with pytest.raises(Overloaded):
        foresee(rig, tier="batch", deadline_s=100.0)


def test_nobody_is_refused_by_guesses() -> None:
    rig = Rig("alpha")
    fill(rig)
    for number in range(50):
        rig.admit(f"later_{number}")
    foresee(rig, tier="interactive")


def test_the_line_has_an_end() -> None:
    rig = Rig("alpha", max_waiting=10)
    fill(rig)
    for number in range(10):
        rig.admit(f"later_{number}")
    with pytest.raises(Overloaded):
        foresee(rig)


def test_a_ticket_of_another_project_waits_less_behind_a_greedy_one() -> None:
    rig = Rig("alpha")
    learn(rig)
    fill(rig, project="greedy")
    for number in range(60):
        rig.admit(f"greedy_{number}", project="greedy")
    with pytest.raises(Overloaded):
        foresee(rig, project="greedy", tier="interactive")
    with pytest.raises(Overloaded):
        foresee(rig, project="greedy", deadline_s=12.0)
    foresee(rig, project="modest", deadline_s=12.0)
    assert make_ticket(project="modest").project == "modest"
