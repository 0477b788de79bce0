"""Replicas that drain, fail, are put out and come back, and how often one tries again."""

from __future__ import annotations

from fabric.broker.signals import (
    Instruction,
    ReplicaReported,
    SendTask,
)
from fabric.errors import (
    ContextExceeded,
    EngineStopped,
)
from fabric.messages import (
    Load,
    RunCompleted,
)
from fabric.testing.broker_rig import (
    SEEDLESS,
    Rig,
    admit,
    only,
)


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
    assert only(rig.finish(trial, 1), SendTask).run_id == "run_b"


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
    rig = Rig("alpha", fair=False)
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
