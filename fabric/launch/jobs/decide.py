"""What to do next about a launch's jobs: a pure function of their records and the time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from fabric.launch.jobs.order import Order
from fabric.launch.jobs.records import JobRecord
from fabric.launch.jobs.submit import get_warning_s
from fabric.messages import InstanceState

MAX_FAILURES = 3
"""Jobs in a row that ended before they were ready, after which no more are submitted."""

MARGIN_S = 20.0
"""A successor is wanted so much earlier than the forecast says."""

LOAD_FACTOR = 2.0
"""A load may take so many times longer than the usual one: others read the same file system."""

EARLIEST_SHARE = 2 / 3
"""A successor is submitted when no more than this part of a job's walltime is left: whatever the
forecast, no job is replaced as fast as the next one loads."""

UNKNOWN_WAIT_SHARE = 0.25
"""The part of its walltime that a job is taken to wait where nobody knows."""


@dataclass(frozen=True, slots=True)
class Submit:
    """A job is wanted for a replica, the so-many-th."""

    replica: int
    generation: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """A successor is ready: let this instance finish what it has and leave."""

    instance: str


@dataclass(frozen=True, slots=True)
class Leave:
    """End a job: by draining it if it is ready, and by the scheduler if it is not."""

    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing more will happen; ``failed`` says whether that is an error."""

    reason: str
    failed: bool = False


Action = Submit | HandOver | Leave | Over


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is expected of a successor, in seconds, and how long each instance has been idle."""

    wait_s: float | None
    load_s: float
    idle_s: dict[str, float]


def decide(
    order: Order,
    jobs: Sequence[JobRecord],
    now: datetime,
    outlook: Outlook,
    *,
    stop: bool = False,
) -> list[Action]:
    """Return what is due.

    Args:
        order: What is asked for.
        jobs: All jobs of the launch so far, oldest first.
        now: The time.
        outlook: How long a successor should take.
        stop: Whether its owner has asked for the end.
    """
    open_jobs = [job for job in jobs if job.open]
    if stop:
        leaving: list[Action] = [
            Leave(job.instance, "its owner ended the launch")
            for job in open_jobs
            if job.state not in (InstanceState.DRAINING, InstanceState.HANDING_OVER)
        ]
        return leaving if open_jobs else [Over("its owner ended it")]
    failure = _failure(jobs)
    if failure is not None and not open_jobs:
        return [Over(failure, failed=True)]
    actions: list[Action] = []
    for replica in range(order.replicas):
        own = [job for job in jobs if job.replica == replica]
        actions += _about(replica, own, order, now, outlook, may_submit=failure is None)
    if not actions and not open_jobs:
        actions.append(_end(jobs))
    return actions


def get_ready_in_s(
    job: JobRecord, order: Order, now: datetime, outlook: Outlook, *, starts_at: datetime | None
) -> float:
    """Return in how many seconds a job's instance should have joined.

    Args:
        job: One that has not ended, and whose instance is not ready.
        order: What it is for.
        now: The time.
        outlook: What is usual.
        starts_at: When its scheduler says that it starts, if it says so.
    """
    if job.started_at is not None:
        return max(0.0, outlook.load_s - (now - job.started_at).total_seconds())
    if starts_at is not None and starts_at > now:
        return (starts_at - now).total_seconds() + outlook.load_s
    waited_s = max(0.0, (now - job.submitted_at).total_seconds())
    left_s = _usual_wait_s(order, outlook) - waited_s
    # Where it has waited longer than expected, as long again is the best guess.
    return (left_s if left_s > 0 else waited_s) + outlook.load_s


def _usual_wait_s(order: Order, outlook: Outlook) -> float:
    return UNKNOWN_WAIT_SHARE * order.walltime_s if outlook.wait_s is None else outlook.wait_s


def _about(
    replica: int,
    jobs: Sequence[JobRecord],
    order: Order,
    now: datetime,
    outlook: Outlook,
    *,
    may_submit: bool,
) -> Iterable[Action]:
    open_jobs = [job for job in jobs if job.open]
    next_generation = len(jobs)
    if not open_jobs:
        if may_submit and (not jobs or _wanted_again(jobs[-1], order, now)):
            yield Submit(replica, next_generation)
        return
    newest = open_jobs[-1]
    for older in open_jobs[:-1]:
        if newest.state is InstanceState.READY and older.state is InstanceState.READY:
            yield HandOver(older.instance)
    if len(open_jobs) == 1 and may_submit and _successor_due(newest, order, now, outlook):
        yield Submit(replica, next_generation)
    idle_s = outlook.idle_s.get(newest.instance, 0.0)
    is_ready = newest.state is InstanceState.READY
    if is_ready and order.idle_stop_s is not None and idle_s >= order.idle_stop_s:
        yield Leave(newest.instance, f"it had nothing to do for {order.idle_stop_s:g} s")


def _successor_due(job: JobRecord, order: Order, now: datetime, outlook: Outlook) -> bool:
    if order.keep_until is None or job.deadline_at is None or job.state.final:
        return False
    if job.deadline_at >= order.keep_until:
        return False
    # It must be ready before this one is told to drain.
    load_s = LOAD_FACTOR * outlook.load_s
    early_s = _usual_wait_s(order, outlook) + load_s + MARGIN_S + get_warning_s(order.walltime_s)
    early = timedelta(seconds=min(early_s, EARLIEST_SHARE * order.walltime_s))
    return now >= job.deadline_at - early


def _wanted_again(last: JobRecord, order: Order, now: datetime) -> bool:
    """Say whether a replica without a job should have one again."""
    if last.detail.startswith("it had nothing to do"):
        return False
    return order.keep_until is not None and now < order.keep_until


def _failure(jobs: Sequence[JobRecord]) -> str | None:
    """Return why no more jobs are submitted: the latest ones all ended before they were ready."""
    ended = [job for job in jobs if not job.open]
    latest = ended[-MAX_FAILURES:]
    if len(latest) == MAX_FAILURES and all(_failed(job) for job in latest):
        return latest[-1].detail
    return None


def _failed(job: JobRecord) -> bool:
    return job.ready_at is None and job.state is InstanceState.FAILED


def _end(jobs: Sequence[JobRecord]) -> Over:
    last = jobs[-1]
    return Over(last.detail or "its jobs have ended", failed=last.state is InstanceState.FAILED)
