"""What is due about a launch's jobs, at moments of their lives."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from fabric.launch.jobs import JobRecord, Order
from fabric.launch.jobs.decide import (
    EARLIEST_SHARE,
    LOAD_FACTOR,
    MARGIN_S,
    HandOver,
    Leave,
    Outlook,
    Over,
    Submit,
    decide,
    get_ready_in_s,
)
from fabric.launch.jobs.submit import get_warning_s
from fabric.messages import InstanceState

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
WALLTIME_S = 3600
OUTLOOK = Outlook(wait_s=100.0, load_s=50.0, idle_s={})
READY, FAILED = InstanceState.READY, InstanceState.FAILED


def order(**changes: object) -> Order:
    fields = {"model": "m@1", "machine": "here", "walltime": "01:00:00"}
    return Order.model_validate(fields | changes)


def job(
    name: str, state: InstanceState, *, age_s: float = 0.0, replica: int = 0, detail: str = ""
) -> JobRecord:
    """A job that started ``age_s`` seconds ago."""
    started = NOW - timedelta(seconds=age_s)
    has_started = state not in (InstanceState.PENDING, FAILED)
    return JobRecord(
        instance=name,
        replica=replica,
        generation=0,
        job_id=name,
        state=state,
        detail=detail,
        submitted_at=started,
        started_at=started if has_started else None,
        deadline_at=started + timedelta(seconds=WALLTIME_S) if has_started else None,
        ready_at=started if state is READY else None,
        ended_at=NOW if state.final else None,
    )


def test_every_replica_gets_a_job() -> None:
    assert decide(order(replicas=2), [], NOW, OUTLOOK) == [Submit(0, 0), Submit(1, 0)]


def test_nothing_is_due_while_a_job_serves() -> None:
    assert decide(order(), [job("a", READY, age_s=WALLTIME_S - 1)], NOW, OUTLOOK) == []


def test_a_job_that_has_ended_ends_its_launch() -> None:
    ended = job("a", InstanceState.EXPIRED, detail="its walltime was over")
    assert decide(order(), [ended], NOW, OUTLOOK) == [Over("its walltime was over")]


def test_a_failure_ends_its_launch_as_one() -> None:
    failed = job("a", FAILED, detail="no weights")
    assert decide(order(), [failed], NOW, OUTLOOK) == [Over("no weights", failed=True)]


def test_a_successor_is_submitted_in_time_to_be_ready_before_the_drain() -> None:
    kept = order(keep_until=NOW + timedelta(days=1))
    due_s = WALLTIME_S - get_warning_s(WALLTIME_S) - 100.0 - LOAD_FACTOR * 50.0 - MARGIN_S
    assert decide(kept, [job("a", READY, age_s=due_s - 1)], NOW, OUTLOOK) == []
    assert decide(kept, [job("a", READY, age_s=due_s)], NOW, OUTLOOK) == [Submit(0, 1)]


def test_no_successor_for_a_job_that_lasts_as_long_as_it_is_wanted() -> None:
    kept = order(keep_until=NOW + timedelta(seconds=30))
    assert decide(kept, [job("a", READY, age_s=WALLTIME_S - 60)], NOW, OUTLOOK) == []


def test_an_unknown_wait_counts_a_part_of_the_walltime() -> None:
    kept = order(keep_until=NOW + timedelta(days=1))
    unknown = Outlook(wait_s=None, load_s=50.0, idle_s={})
    assert decide(kept, [job("a", READY, age_s=WALLTIME_S / 2)], NOW, unknown) == []
    late = job("a", READY, age_s=0.69 * WALLTIME_S)
    assert decide(kept, [late], NOW, unknown) == [Submit(0, 1)]


def test_no_job_is_replaced_as_fast_as_the_next_one_loads() -> None:
    """A scheduler may say for each that it will wait for hours, and start it at once."""
    kept = order(keep_until=NOW + timedelta(days=1))
    outlook = Outlook(wait_s=10 * WALLTIME_S, load_s=50.0, idle_s={})
    due_s = (1 - EARLIEST_SHARE) * WALLTIME_S
    assert decide(kept, [job("a", READY, age_s=due_s - 1)], NOW, outlook) == []
    assert decide(kept, [job("a", READY, age_s=due_s)], NOW, outlook) == [Submit(0, 1)]


def test_one_successor_is_enough() -> None:
    kept = order(keep_until=NOW + timedelta(days=1))
    jobs = [job("a", READY, age_s=WALLTIME_S - 60), job("b", InstanceState.PENDING)]
    assert decide(kept, jobs, NOW, OUTLOOK) == []


def test_a_ready_successor_takes_over() -> None:
    kept = order(keep_until=NOW + timedelta(days=1))
    jobs = [job("a", READY, age_s=WALLTIME_S - 60), job("b", READY)]
    assert decide(kept, jobs, NOW, OUTLOOK) == [HandOver("a")]


def test_a_replica_that_died_comes_back_while_it_is_wanted() -> None:
    kept = order(keep_until=NOW + timedelta(days=1), replicas=2)
    dead = job("a", READY).model_copy(update={"state": FAILED, "ended_at": NOW})
    jobs = [dead, job("b", READY, replica=1)]
    assert decide(kept, jobs, NOW, OUTLOOK) == [Submit(0, 1)]


def test_three_jobs_that_never_served_are_enough() -> None:
    kept = order(keep_until=NOW + timedelta(days=1))
    jobs = [job(name, FAILED, detail="no weights") for name in "ab"]
    assert decide(kept, jobs, NOW, OUTLOOK) == [Submit(0, 2)]
    jobs.append(job("c", FAILED, detail="no weights"))
    assert decide(kept, jobs, NOW, OUTLOOK) == [Over("no weights", failed=True)]


def test_failing_successors_let_the_job_that_serves_end_its_time() -> None:
    kept = order(keep_until=NOW + timedelta(days=1))
    jobs = [job("a", READY, age_s=WALLTIME_S - 60), *(job(name, FAILED) for name in "bcd")]
    assert decide(kept, jobs, NOW, OUTLOOK) == []


@pytest.mark.parametrize("idle_s", [59.0, 60.0])
def test_an_idle_instance_leaves(idle_s: float) -> None:
    outlook = Outlook(wait_s=0.0, load_s=0.0, idle_s={"a": idle_s})
    actions = decide(order(idle_stop_s=60.0), [job("a", READY)], NOW, outlook)
    assert actions == ([Leave("a", "it had nothing to do for 60 s")] if idle_s == 60.0 else [])


def test_what_left_because_it_was_idle_does_not_come_back() -> None:
    kept = order(keep_until=NOW + timedelta(days=1), idle_stop_s=60.0)
    left = job("a", InstanceState.STOPPED, detail="it had nothing to do for 60 s")
    assert decide(kept, [left], NOW, OUTLOOK) == [Over("it had nothing to do for 60 s")]


def test_a_stop_asks_everything_to_leave_once() -> None:
    jobs = [job("a", READY), job("b", InstanceState.DRAINING)]
    (leave,) = decide(order(replicas=2), jobs, NOW, OUTLOOK, stop=True)
    assert leave == Leave("a", "its owner ended the launch")
    ended = [one.model_copy(update={"ended_at": NOW}) for one in jobs]
    assert decide(order(), ended, NOW, OUTLOOK, stop=True) == [Over("its owner ended it")]


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("state", "age_s", "starts_at", "ready_in_s"),
    [
        (InstanceState.PENDING, 30, None, 70 + 50),
        (InstanceState.PENDING, 300, None, 300 + 50),
        (InstanceState.PENDING, 30, after(400), 400 + 50),
        (InstanceState.PENDING, 30, after(-5), 70 + 50),
        (InstanceState.STARTING, 20, None, 30),
        (InstanceState.LOADING, 200, after(400), 0),
    ],
    ids=["usual wait", "waits on", "scheduler", "past", "loads", "overdue"],
)
def test_an_instance_is_expected_by_what_is_known(
    state: InstanceState, age_s: float, starts_at: datetime | None, ready_in_s: float
) -> None:
    one = job("a", state, age_s=age_s)
    assert get_ready_in_s(one, order(), NOW, OUTLOOK, starts_at=starts_at) == ready_in_s


def test_where_no_wait_is_known_a_part_of_the_walltime_stands_for_it() -> None:
    unknown = Outlook(wait_s=None, load_s=50.0, idle_s={})
    one = job("a", InstanceState.PENDING)
    assert get_ready_in_s(one, order(), NOW, unknown, starts_at=None) == WALLTIME_S / 4 + 50
