"""States, a sentence each."""

from __future__ import annotations

from enum import StrEnum


class InstanceState(StrEnum):
    """Where an instance is in its life."""

    PENDING = "pending"
    """Its block waits in the scheduler's queue."""
    STARTING = "starting"
    """Its block runs; the process has not reported yet."""
    LOADING = "loading"
    """The process reads weights and has not generated its canary."""
    READY = "ready"
    """It takes requests."""
    DRAINING = "draining"
    """It finishes what it has and takes nothing new."""
    HANDING_OVER = "handing-over"
    """Its successor is ready and takes what comes; it finishes what it has."""
    LOST = "lost"
    """Its session ended without a goodbye; it may come back."""
    STOPPED = "stopped"
    """It said goodbye, or its launch was ended."""
    EXPIRED = "expired"
    """Its job's walltime was over."""
    FAILED = "failed"
    """It ended by an error and is not started again."""

    @property
    def final(self) -> bool:
        """Whether no other state follows."""
        return self in FINAL_INSTANCE_STATES


FINAL_INSTANCE_STATES = frozenset(
    {InstanceState.STOPPED, InstanceState.EXPIRED, InstanceState.FAILED}
)


class RunState(StrEnum):
    """Where a request is in its life."""

    RECEIVED = "received"
    """The gateway has read it."""
    QUEUED = "queued"
    """Admitted: its largest charge is held; no replica has it yet."""
    DISPATCHED = "dispatched"
    """Sent to a replica that has not answered."""
    RUNNING = "running"
    """A replica has accepted it."""
    COMPLETED = "completed"
    """Answered and settled."""
    FAILED = "failed"
    """Ended by an error; what was delivered is settled, the rest is returned."""
    CANCELLED = "cancelled"
    """Its caller went away; what was computed is settled."""

    @property
    def final(self) -> bool:
        """Whether no other state follows."""
        return self in FINAL_RUN_STATES


FINAL_RUN_STATES = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED})
