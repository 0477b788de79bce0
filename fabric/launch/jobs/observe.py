"""What becomes of a job's record by what its scheduler and its instance say: a pure function."""

from __future__ import annotations

from datetime import datetime, timedelta

from fabric.launch.jobs.login import Sight
from fabric.launch.jobs.queue import JobPhase
from fabric.launch.jobs.records import JobRecord
from fabric.launch.jobs.submit import get_warning_s
from fabric.messages import InstanceState, InstanceStatus

LEAVING = frozenset({InstanceState.DRAINING, InstanceState.HANDING_OVER})
"""What an instance is from when it was asked to leave until it has."""


def observe(
    job: JobRecord, sight: Sight, now: datetime, *, walltime_s: int, joined: bool
) -> JobRecord:
    """Return a job's record as it is now.

    Args:
        job: As it was; it has not ended.
        sight: What is seen of it.
        now: The time.
        walltime_s: How long it may run.
        joined: Whether the hub has its instance.
    """
    state = sight.state
    if state.phase is JobPhase.QUEUED:
        position = f", {state.position} before it" if state.position else ""
        return job.model_copy(update={"detail": f"{state.reason or 'in the queue'}{position}"})
    if state.phase is not JobPhase.RUNNING:
        return job.model_copy(update=_seen_of_end(job, sight, now, walltime_s))
    changes: dict[str, object] = {}
    if job.started_at is None:
        started = min(now, state.start_at or now)
        deadline = started + timedelta(seconds=walltime_s)
        changes = {"started_at": started, "deadline_at": deadline}
    changes |= _seen_of_instance(job, sight.status, now, joined=joined)
    return job.model_copy(update=changes)


def _seen_of_instance(
    job: JobRecord, status: InstanceStatus | None, now: datetime, *, joined: bool
) -> dict[str, object]:
    if status is None:
        return {"state": InstanceState.STARTING, "detail": ""}
    state = InstanceState(status.state)
    if job.state in LEAVING and state is InstanceState.READY:
        state = job.state  # it was asked, and has not begun yet
    elif job.state is InstanceState.HANDING_OVER and state is InstanceState.DRAINING:
        state = job.state
    if state.final:
        return {}  # the job's own end follows, and says how
    is_new = state is InstanceState.READY and job.ready_at is None
    if is_new and not joined:
        return {"state": InstanceState.LOADING, "detail": status.detail or "joining the pool"}
    changes: dict[str, object] = {"state": state}
    if state is not job.state or state is InstanceState.LOADING:
        changes["detail"] = status.detail
    if is_new:
        changes["ready_at"] = now
    return changes


def _seen_of_end(job: JobRecord, sight: Sight, now: datetime, walltime_s: int) -> dict[str, object]:
    state, status = sight.state, sight.status
    said = InstanceState(status.state) if status is not None else None
    over = job.deadline_at is not None and now >= job.deadline_at - timedelta(
        seconds=get_warning_s(walltime_s)
    )
    word = state.word or "it is not known to the scheduler any more"
    if said is InstanceState.FAILED and status is not None:
        final, detail = InstanceState.FAILED, status.detail.rstrip(".")
    elif state.word == "NODE_FAIL":
        final, detail = InstanceState.FAILED, "its job ended: NODE_FAIL, a node of it was lost"
    elif job.state in LEAVING:
        final, detail = InstanceState.STOPPED, job.detail or "it left"
    elif state.word == "TIMEOUT" or (over and job.ready_at is not None):
        final, detail = InstanceState.EXPIRED, "its walltime was over"
    elif over:
        final = InstanceState.FAILED
        detail = "its walltime was over before it was ready; ask for more"
    elif said is InstanceState.STOPPED and job.ready_at is not None and state.word != "FAILED":
        final, detail = InstanceState.STOPPED, "it was asked to leave"
    else:
        reason = f" ({state.reason})" if state.reason else ""
        final, detail = InstanceState.FAILED, f"its job ended: {word}{reason}"
    return {"state": final, "detail": detail, "ended_at": now}
