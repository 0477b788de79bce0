"""How runs end, and how long one waits before its next attempt: pure functions of its progress."""

from __future__ import annotations

from hashlib import blake2b

from fabric.broker.progress import Progress
from fabric.broker.signals import Outcome, Settle, Void
from fabric.errors import (
    AuthError,
    ConfigError,
    DeadlineExceeded,
    FabricError,
    LedgerError,
    StreamBroken,
)
from fabric.messages import Failed, Failure, RunCompleted, RunFailed, RunState, Usage

BACKOFF_S = 0.2

HUBS_OWN = (AuthError, ConfigError, LedgerError)
"""What no instance has to say of a task: a client would take it for the hub's word."""

MAX_FAILURE_CHARS = 2**16
"""The longest error of an instance that is passed on."""


def get_outcome(
    run: Progress,
    now: float,
    state: RunState,
    reported: Usage | None,
    failure_code: str | None = None,
) -> Outcome:
    """Return the end of a run at ``now``, as it is settled and recorded."""
    usage = run.usage(reported, now)
    return Outcome(
        ticket=run.ticket,
        state=state,
        placement=run.placement,
        attempts=run.num_sent,
        usage=usage,
        charge_usu=run.charge_usu(usage),
        first_token_s=since_start_s(run),
        total_s=now - run.started_at,
        failure_code=failure_code,
        first_s=_first_s(run),
        token_s=_token_s(run),
    )


def get_closing(run: Progress, outcome: Outcome) -> Settle | Void:
    """Return what becomes of a run's hold: charged where something was used, else returned."""
    run_id = run.ticket.request.id
    if (site := run.paid_site) is None or outcome.usage == Usage():
        return Void(run_id=run_id, outcome=outcome)
    return Settle(run_id=run_id, site=site, outcome=outcome)


def get_completed(run: Progress, outcome: Outcome) -> RunCompleted:
    """Return what a completed run tells its client."""
    placement = run.placement
    assert placement is not None
    return RunCompleted(
        run=run.ticket.request.id,
        model=run.ticket.model,
        digest=run.ticket.digest,
        adapter=run.ticket.adapter,
        site=placement.site,
        instance=placement.instance,
        attempts=run.num_sent,
        finish_reasons=tuple(reason for reason in run.finishes if reason is not None),
        usage=outcome.usage,
        charge_usu=outcome.charge_usu,
        first_token_s=outcome.first_token_s,
        total_s=outcome.total_s,
        placement=placement,
    )


def get_failed(run: Progress, outcome: Outcome, error: FabricError) -> RunFailed:
    """Return what a run that failed, or was cancelled, tells its client."""
    return RunFailed(
        run=run.ticket.request.id,
        failure=Failure.of(error),
        usage=outcome.usage,
        charge_usu=outcome.charge_usu,
    )


def since_start_s(run: Progress) -> float | None:
    """Return the seconds to the first token, if there was one."""
    return None if run.first_token_at is None else run.first_token_at - run.started_at


def _first_s(run: Progress) -> float | None:
    """Return the seconds to the first token, embedding or save."""
    at = run.attempt_first_at if run.first_token_at is None else run.first_token_at
    return None if at is None else at - run.started_at


def _token_s(run: Progress) -> float | None:
    """Return the mean seconds from token to token of a choice, if that says anything of us."""
    num_steps = max(run.counts) - 1
    if run.held_back or num_steps < 1 or run.first_token_at is None:
        return None
    return (run.last_token_at - run.first_token_at) / num_steps


def too_late(run: Progress) -> DeadlineExceeded:
    """Return what a run ends with whose deadline is over."""
    return DeadlineExceeded(deadline_s=run.ticket.request.deadline_s, attempts=run.num_sent)


def broken(run: Progress, instance: str, error: FabricError) -> StreamBroken:
    """Return what a stream ends with that cannot go on elsewhere, and why it cannot."""
    if run.ticket.bounds is not None:
        return StreamBroken(
            instance=instance,
            num_tokens=run.num_tokens,
            cause=error.code,
            why="a program that has begun to answer is not begun again; send it again",
        )
    if run.ticket.request.sampling.reproducible:
        return StreamBroken(
            instance=instance,
            num_tokens=run.num_tokens,
            cause=error.code,
            why="only a single choice can be continued elsewhere",
        )
    return StreamBroken(instance=instance, num_tokens=run.num_tokens, cause=error.code)


def not_its_to_say(failed: Failed) -> str | None:
    """Return what is wrong with an error that an instance may not tell."""
    error = failed.failure.to_error()
    if isinstance(error, HUBS_OWN):
        return f"the error {error.code}, which is the hub's own to tell"
    if len(failed.failure.model_dump_json()) > MAX_FAILURE_CHARS:
        return "an error that is too long"
    return None


def backoff_s(run: Progress) -> float:
    """Return a pause with full jitter that is the same for the same run and attempt."""
    drawn = blake2b(f"{run.ticket.request.id}/{run.attempt}".encode(), digest_size=4).digest()
    return float(BACKOFF_S * 2**run.attempt * int.from_bytes(drawn) / 2**32)
