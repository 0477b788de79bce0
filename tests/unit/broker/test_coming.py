"""Requests that nothing can serve now, while a replica that could is on its way."""

from __future__ import annotations

import pytest

from fabric.broker.coming import MEMORY_S
from fabric.broker.select import Context
from fabric.broker.signals import (
    ReplicaExpected,
    ReplicaGivenUp,
    ReplicaReported,
    SendTask,
)
from fabric.errors import NoReplica
from fabric.messages import Load, RunCompleted, RunFailed
from fabric.testing.broker_rig import DIGEST, SEEDLESS, Rig, admit, make_ticket, only

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


def foresee(rig: Rig, **changes: object) -> object:
    ticket = make_ticket(**changes)  # type: ignore[arg-type]
    context = Context(
        model=ticket.model,
        digest=DIGEST,
        offers=ticket.offers,
        remaining_s=ticket.request.deadline_s,
        settings=rig.state._settings,
    )
    return rig.state.foresee(rig.now, ticket.request, context, project="astro")


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
    expect(rig, 5, **other)  # type: ignore[arg-type]
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
