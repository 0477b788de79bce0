"""Requests that their caller's own instances keep, until there is none."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.broker.own import get_own
from fabric.broker.select import Context, Offer, decide
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    HoldMoved,
    MoveHold,
    ReplicaExpected,
    ReplicaGivenUp,
    ReplicaReported,
    SendTask,
)
from fabric.errors import NoReplica, Overloaded
from fabric.messages import Load, Placement, Request, Sampling, TokensInput
from fabric.testing.broker_rig import DIGEST, Rig, make_ticket, offer, only

OWN = {"mine": True}
ROWS = 4
OFFERS = (
    offer("mine", max_charge_usu=0, expected_charge_usu=0),
    offer("shared", allocation="allocation:astro:shared"),
)


def admit(rig: Rig, run_id: str = "run_1", **changes: Any) -> SendTask | None:
    """Admit a request; to go elsewhere its hold must move."""
    return rig.admit(run_id, **{"own": OWN, "offers": OFFERS} | changes)


def moving(rig: Rig) -> list[str]:
    """Return the runs that were to go elsewhere."""
    return [one.run_id for one in rig.all(MoveHold)]


def go(rig: Rig, run_id: str) -> str:
    """Have a run's hold moved; return where it goes."""
    return only(rig.feed(HoldMoved(now=rig.now, run_id=run_id)), SendTask).instance


def fill(rig: Rig) -> list[SendTask]:
    """Have the own instance's rows taken; the shared one stays idle."""
    tasks = []
    for number in range(ROWS):
        task = admit(rig, f"first_{number}")
        assert task is not None
        assert task.instance == "mine-1"
        rig.accept(task)
        tasks.append(task)
    return tasks


def end(rig: Rig, task: SendTask) -> list[str]:
    """Have a task answered; return which runs go next."""
    for position in range(4):
        rig.token(task, position, "length" if position == 3 else None)
    return [one.run_id for one in rig.finish(task, 4) if isinstance(one, SendTask)]


def expect(rig: Rig, ready_in_s: float) -> None:
    rig.feed(
        ReplicaExpected(
            now=rig.now, instance="mine-2", site="mine", model="smol@1", ready_in_s=ready_in_s
        )
    )


def request(**changes: Any) -> Request:
    return make_ticket("run_new", **changes).request


def context(*offers: Offer, **changes: Any) -> Context:
    fields: dict[str, Any] = {
        "model": "smol@1",
        "digest": DIGEST,
        "offers": {one.site: one for one in offers or OFFERS},
        "remaining_s": 300.0,
        "settings": BrokerSettings(),
        "own": OWN,
    }
    return Context(**fields | changes)


def foresee(rig: Rig, *, deadline_s: float = 300.0, **changes: Any) -> Placement | None:
    """Do as admission does before it holds the charge."""
    means = context(remaining_s=deadline_s, **changes)
    return rig.state.foresee(rig.now, request(deadline_s=deadline_s), means, project="astro")


def test_requests_wait_for_their_own_instance_though_another_is_idle() -> None:
    rig = Rig("mine", "shared")
    tasks = fill(rig)
    assert admit(rig, "waits") is None
    assert rig.tick(20.0) == []
    assert end(rig, tasks[0]) == ["waits"]
    assert moving(rig) == []


def test_those_without_instances_of_their_own_pass_the_ones_that_wait() -> None:
    rig = Rig("mine", "shared")
    fill(rig)
    assert admit(rig, "waits") is None
    assert admit(rig, "others", own={}, project="others") is None
    assert admit(rig, "overflows", own={}) is None
    assert moving(rig) == ["others", "overflows"]
    assert {go(rig, "others"), go(rig, "overflows")} == {"shared-1"}


def test_the_table_says_what_keeps_a_request() -> None:
    rig = Rig("mine", "shared")
    sent = admit(rig)
    assert sent is not None
    placement = rig.state.runs["run_1"].placement
    assert placement is not None
    [excluded] = [one.excluded for one in placement.candidates if one.site == "shared"]
    assert excluded == "your own instances keep it (mine); `overflow` lets it leave them"
    assert "keep it (mine)" in placement.reason


@pytest.mark.parametrize("gone", ["lost", "left", "drains"])
def test_without_an_instance_of_their_own_those_that_wait_go_elsewhere(gone: str) -> None:
    rig = Rig("mine", "shared")
    fill(rig)
    assert admit(rig, "waits") is None
    if gone == "drains":
        rig.feed(ReplicaReported(now=rig.now, instance="mine-1", load=Load(), draining=True))
    else:
        rig.leave("mine-1", lost=gone == "lost")
    rig.tick(0.1)
    assert moving(rig) == ["waits"]
    assert go(rig, "waits") == "shared-1"


def test_a_successor_takes_over_and_nothing_goes_elsewhere() -> None:
    rig = Rig("mine", "shared")
    tasks = fill(rig)
    assert admit(rig, "waits") is None
    rig.join("mine", "mine-2")
    rig.feed(ReplicaReported(now=rig.now, instance="mine-1", load=Load(), draining=True))
    sent = {one.run_id: one.instance for one in rig.all(SendTask)}
    assert sent["waits"] == "mine-2"
    after = admit(rig, "after")
    assert after is not None
    assert after.instance == "mine-2"
    for task in tasks:
        assert end(rig, task) == []
    assert moving(rig) == []


def test_one_on_its_way_keeps_what_it_can_still_answer() -> None:
    rig = Rig("shared")
    expect(rig, 60.0)
    assert foresee(rig) is None
    assert admit(rig, "waits") is None
    late = foresee(rig, deadline_s=50.0)
    assert late is not None
    assert late.site == "shared"
    assert only(rig.join("mine", "mine-2"), SendTask).instance == "mine-2"


def test_one_with_less_time_passes_those_that_wait_for_one_on_its_way() -> None:
    rig = Rig("shared")
    expect(rig, 60.0)
    assert admit(rig, "patient") is None
    assert admit(rig, "urgent", deadline_s=50.0) is None
    assert moving(rig) == ["urgent"]
    assert admit(rig, "sooner", deadline_s=70.0) is None
    rig.tick(5.0)
    expect(rig, 80.0)  # later than was told before
    rig.tick(10.0)
    assert moving(rig) == ["urgent", "sooner"]


def test_one_that_is_given_up_keeps_nothing_for_long() -> None:
    rig = Rig("shared", patience_s=2.0)
    expect(rig, 60.0)
    assert admit(rig, "waits") is None
    rig.feed(ReplicaGivenUp(now=rig.now, instance="mine-2"))
    rig.tick(2.0)
    assert moving(rig) == ["waits"]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": Sampling(max_tokens=4, temperature=0.0, n=5)},
        {"adapter": "tuned"},
        {"input": TokensInput(ids=(1,) * 65)},
    ],
    ids=["rows", "adapter", "context"],
)
def test_what_the_own_instance_cannot_serve_is_not_kept(changes: dict[str, Any]) -> None:
    rig = Rig("mine", "shared")
    asked = request().model_copy(update=changes)
    assert rig.state.experience.informed(rig.now, asked, context()).kept_by == ()
    assert rig.state.experience.informed(rig.now, request(), context()).kept_by == ("mine",)


def test_one_whose_block_ends_too_soon_keeps_nothing() -> None:
    rig = Rig("shared")
    rig.join("mine", "mine-1", deadline_s=0.05)
    assert rig.state.experience.informed(rig.now, request(), context()).kept_by == ()
    rig.join("mine", "mine-2", deadline_s=60.0)
    assert rig.state.experience.informed(rig.now, request(), context()).kept_by == ("mine",)


def learn(rig: Rig) -> None:
    """Let their own instance be seen to take 10 s for a request."""
    for number in range(8):
        task = admit(rig, f"known_{number}")
        assert task is not None
        rig.accept(task)
        rig.now += 10.0
        end(rig, task)


def test_a_full_instance_of_their_own_refuses_what_would_come_too_late() -> None:
    rig = Rig("mine", "shared")
    learn(rig)
    fill(rig)
    for number in range(ROWS):
        assert admit(rig, f"waits_{number}") is None
    with pytest.raises(Overloaded) as caught:
        foresee(rig, deadline_s=30.0)
    assert float(str(caught.value.detail["retry_after_s"])) >= 1
    elsewhere = foresee(rig, own={}, deadline_s=30.0)
    assert elsewhere is not None
    assert elsewhere.site == "shared"


def test_what_waits_for_other_rows_is_not_counted_before_a_kept_request() -> None:
    rig = Rig("mine", "shared")
    learn(rig)
    fill(rig)
    waiting = [admit(rig, f"others_{n}", own={}, offers=(offer("shared"),)) for n in range(60)]
    assert waiting.count(None) == 60 - ROWS
    kept = foresee(rig, deadline_s=60.0)
    assert kept is not None
    assert kept.site == "mine"
    with pytest.raises(Overloaded):
        foresee(rig, own={}, deadline_s=60.0)


def test_none_keeps_a_request_that_says_where_it_may_run() -> None:
    offered, own = ("mine", "more", "shared"), {"more": False, "mine": True}
    assert get_own(request(), own, offered) == own
    assert get_own(request(overflow=True), own, offered) == {}
    assert get_own(request(sites=("shared",)), own, offered) == {}
    assert get_own(request(policy="local-only", data_site="shared"), own, offered) == {}
    assert get_own(request(policy="fastest"), own, offered) == own
    assert get_own(request(), own, ("more", "shared")) == {}, "the one that keeps is not offered"
    assert get_own(request(), {"more": False}, offered) == {}


def test_an_instance_that_lets_requests_out_is_their_own_all_the_same() -> None:
    rig = Rig("mine", "more", "shared")
    means = context(*OFFERS, offer("more"), own={"mine": True, "more": False})
    told = rig.state.experience.informed(rig.now, request(), means)
    table = decide(request(), rig.state.fleet.pool(rig.now), told).placement().candidates
    assert {one.site for one in table if one.excluded is None} == {"mine", "more"}


def test_a_refusal_says_what_keeps_it_and_until_when() -> None:
    rig = Rig("shared")
    expect(rig, 10.0)
    told = rig.state.experience.informed(rig.now, request(), context())
    with pytest.raises(NoReplica) as caught:
        decide(request(), rig.state.fleet.pool(rig.now), told)
    assert "`overflow` lets it leave" in caught.value.message
