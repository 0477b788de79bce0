"""Requests while a replica is on its way: that nothing else can serve, or not as soon."""

from __future__ import annotations

import pytest

from fabric.broker.coming import MEMORY_S
from fabric.broker.cost import HELD_UP
from fabric.broker.select import decide
from fabric.broker.signals import (
    ReplicaExpected,
    ReplicaGivenUp,
    ReplicaReported,
    SendTask,
)
from fabric.errors import NoReplica
from fabric.messages import Load, Placed, Placement, RunCompleted, RunFailed
from fabric.testing.broker_rig import SEEDLESS, Rig, admit, foresee, informed, offer, only

PATIENCE_S = 10.0


@pytest.fixture
def rig() -> Rig:
    """Alpha's only replica drains."""
    rig = Rig("alpha", patience_s=PATIENCE_S)
    rig.feed(ReplicaReported(now=rig.now, instance="alpha-1", load=Load(), draining=True))
    return rig


def expect(
    rig: Rig,
    ready_in_s: float,
    *,
    site: str = "alpha",
    model: str = "smol@1",
    instance: str = "alpha-2",
) -> None:
    rig.feed(
        ReplicaExpected(
            now=rig.now, instance=instance, site=site, model=model, ready_in_s=ready_in_s
        )
    )


def wait(rig: Rig, seconds: float, ready_in_s: float) -> None:
    """Time goes by in steps, in which its launcher repeats when the replica should be there."""
    for _ in range(round(seconds / 10)):
        rig.tick(10)
        ready_in_s -= 10
        expect(rig, max(0.0, ready_in_s))


def test_a_request_waits_for_a_successor_beyond_its_patience(rig: Rig) -> None:
    expect(rig, 60)
    assert rig.admit(deadline_s=120) is None
    wait(rig, 50, 60)
    sent = only(rig.join("alpha", "alpha-2"), SendTask)
    assert sent.instance == "alpha-2"
    rig.token(sent, 0, "stop")
    rig.finish(sent, 1)
    assert rig.emitted(RunCompleted)
    assert not rig.emitted(RunFailed)


def test_a_request_waits_though_the_old_replica_has_left(rig: Rig) -> None:
    rig.leave("alpha-1", lost=False)
    expect(rig, 60)
    assert foresee(rig, deadline_s=120) is None
    assert rig.admit(deadline_s=120) is None
    wait(rig, 30, 60)
    assert only(rig.join("alpha", "alpha-2"), SendTask).instance == "alpha-2"


# Four rows at alpha-1 and 400 requests of others before them: it would take 13.5 s.
BUSY = Load(num_running=4, num_waiting=400)


@pytest.fixture
def busy() -> Rig:
    rig = Rig("alpha")
    rig.feed(ReplicaReported(now=rig.now, instance="alpha-1", load=BUSY, draining=False))
    return rig


def outlook(rig: Rig) -> Placement:
    request, context = informed(rig)
    return decide(request, rig.state.fleet.snapshots(rig.now), context).outlook()


def test_one_on_its_way_is_waited_for_where_that_is_quicker_than_the_busy_one(busy: Rig) -> None:
    expect(busy, 4)
    assert busy.admit() is None
    assert busy.tick(2) == []
    sent = only(busy.join("alpha", "alpha-2"), SendTask)
    assert sent.instance == "alpha-2"
    assert sent.task.attempt == 1


def test_a_busy_one_is_taken_where_the_other_comes_later(busy: Rig) -> None:
    expect(busy, 6)
    sent = busy.admit()
    assert sent is not None
    assert sent.instance == "alpha-1"
    [placed] = busy.emitted(Placed)
    [here, coming] = placed.placement.candidates
    assert (here.instance, here.ready_in_s) == ("alpha-1", None)
    assert (coming.instance, coming.ready_in_s) == ("alpha-2", 6.0)
    assert coming.cost_s["cold"] == pytest.approx(6.0)
    assert here.total_s is not None
    assert coming.total_s is not None
    assert coming.total_s < here.total_s < HELD_UP * coming.total_s


def test_one_that_falls_behind_again_and_again_is_not_waited_for_longer_than_the_busy_one(
    busy: Rig,
) -> None:
    began = busy.now
    expect(busy, 3)
    assert busy.admit() is None
    while not busy.all(SendTask) and busy.now < began + 60:
        busy.tick(0.5)
        expect(busy, 3)
    assert only(busy.done, SendTask).instance == "alpha-1"
    assert busy.now - began < 13.5


def test_one_that_is_overdue_is_not_waited_for(busy: Rig) -> None:
    expect(busy, 2)
    assert busy.admit() is None
    busy.tick(2.5)
    assert only(busy.done, SendTask).instance == "alpha-1"


def test_one_that_is_given_up_is_not_waited_for(busy: Rig) -> None:
    expect(busy, 4)
    assert busy.admit() is None
    busy.feed(ReplicaGivenUp(now=busy.now, instance="alpha-2"))
    busy.tick(0.1)
    assert only(busy.done, SendTask).instance == "alpha-1"


@pytest.mark.parametrize(("deadline_s", "waits"), [(120, True), (50, False)])
def test_a_cheaper_one_is_waited_for_by_who_has_the_time(deadline_s: float, waits: bool) -> None:
    rig = Rig("beta")
    expect(rig, 30)
    offers = offer("alpha"), offer("beta", expected_charge_usu=1_000_000)
    assert (rig.admit(deadline_s=deadline_s, offers=offers) is None) == waits


@pytest.mark.parametrize(
    "other", [{"model": "other@1"}, {"site": "gamma"}], ids=["model", "foreign site"]
)
def test_what_could_not_serve_it_delays_nothing(busy: Rig, other: dict[str, str]) -> None:
    expect(busy, 1, **other)
    assert busy.admit() is not None


def test_a_trial_is_not_put_off_for_one_that_comes() -> None:
    offers = offer("alpha"), offer("beta", expected_charge_usu=1_500)

    def goes_to(run_id: str, *, is_one_coming: bool) -> str | None:
        rig = Rig("alpha", "beta", explore=1.0)
        if is_one_coming:
            expect(rig, 0.3)
        sent = rig.admit(run_id, offers=offers)
        return None if sent is None else sent.instance

    runs = [f"run_{number}" for number in range(20)]
    trials = [run for run in runs if goes_to(run, is_one_coming=False) == "beta-1"]
    assert trials
    assert {goes_to(run, is_one_coming=True) for run in trials} == {"beta-1"}


def test_the_outlook_names_the_one_that_is_waited_for(busy: Rig) -> None:
    assert outlook(busy).instance == "alpha-1"
    expect(busy, 4)
    told = outlook(busy)
    assert told.instance == "alpha-2"
    assert "alpha-2 is on its way and ready in about 4 s" in told.reason
    assert {one.instance for one in told.candidates} == {"alpha-1", "alpha-2"}
    expect(busy, 400)
    assert outlook(busy).instance == "alpha-1"


def test_without_a_successor_patience_is_short(rig: Rig) -> None:
    assert rig.admit(deadline_s=120) is None
    rig.tick(PATIENCE_S)
    assert rig.failure().code == "no_replica"


def test_a_wait_ends_with_the_deadline_where_a_successor_is_overdue(rig: Rig) -> None:
    expect(rig, 20)
    assert rig.admit(deadline_s=60) is None
    wait(rig, 50, 20)
    assert not rig.emitted(RunFailed)
    rig.tick(10)
    assert rig.failure().code == "deadline_exceeded"


def test_one_that_comes_too_late_is_told_with_when_to_come_again(rig: Rig) -> None:
    rig.leave("alpha-1", lost=False)
    expect(rig, 300)
    with pytest.raises(NoReplica) as caught:
        foresee(rig, deadline_s=120)
    assert caught.value.detail["retry_after_s"] == 300
    assert "expected in 300 s" in caught.value.message


def test_a_successor_that_falls_behind_ends_the_wait_with_when_to_come_again(rig: Rig) -> None:
    expect(rig, 60)
    assert rig.admit(deadline_s=120) is None
    rig.tick(15)
    expect(rig, 600)
    rig.tick(0.1)
    assert rig.failure().code == "no_replica"
    assert rig.failure().detail["retry_after_s"] == 600


def test_a_successor_that_is_given_up_ends_the_wait(rig: Rig) -> None:
    expect(rig, 60)
    assert rig.admit(deadline_s=120) is None
    rig.tick(15)
    rig.feed(ReplicaGivenUp(now=rig.now, instance="alpha-2"))
    rig.tick(0.1)
    assert rig.failure().code == "no_replica"


def test_what_its_launcher_does_not_repeat_is_forgotten(rig: Rig) -> None:
    expect(rig, 100)
    assert rig.admit(deadline_s=120) is None
    rig.tick(MEMORY_S - 1)
    assert not rig.emitted(RunFailed)
    rig.tick(2)
    rig.tick(0.1)
    assert rig.failure().code == "no_replica"


@pytest.mark.parametrize(
    "other", [{"model": "other@1"}, {"site": "gamma"}], ids=["model", "foreign site"]
)
def test_what_could_not_serve_it_is_not_waited_for(rig: Rig, other: dict[str, str]) -> None:
    rig.leave("alpha-1", lost=False)
    expect(rig, 5, **other)
    with pytest.raises(NoReplica) as caught:
        foresee(rig, deadline_s=120)
    assert "on its way" not in caught.value.message


def test_a_request_for_another_site_does_not_wait(rig: Rig) -> None:
    expect(rig, 5)
    with pytest.raises(NoReplica):
        foresee(rig, deadline_s=120, sites=("beta",))


def test_a_replica_that_is_there_is_not_expected_again() -> None:
    rig = Rig("alpha")
    expect(rig, 5, instance="alpha-1")
    rig.leave("alpha-1", lost=False)
    with pytest.raises(NoReplica) as caught:
        foresee(rig, deadline_s=120)
    assert "on its way" not in caught.value.message


def test_a_stream_that_has_begun_ends_as_before() -> None:
    rig = Rig("alpha", patience_s=PATIENCE_S)
    expect(rig, 60)
    sent = admit(rig, sampling=SEEDLESS)
    rig.token(sent, 0)
    rig.lose(sent)
    assert rig.failure().code == "stream_broken"


def test_a_reproducible_stream_that_has_begun_keeps_its_patience() -> None:
    rig = Rig("alpha", patience_s=PATIENCE_S)
    sent = admit(rig, deadline_s=120)
    rig.token(sent, 0)
    rig.leave("alpha-1")
    rig.lose(sent)
    expect(rig, 60)
    rig.tick(PATIENCE_S)
    assert rig.failure().code == "session_lost"


def test_a_lost_attempt_without_a_token_waits_for_the_successor() -> None:
    rig = Rig("alpha", patience_s=PATIENCE_S)
    sent = admit(rig, deadline_s=120)
    rig.leave("alpha-1")
    rig.lose(sent)
    expect(rig, 60)
    wait(rig, 40, 60)
    assert only(rig.join("alpha", "alpha-2"), SendTask).task.attempt == 2
