"""How runs end, and how long one waits before its next attempt: pure functions of its progress."""

from __future__ import annotations

from hashlib import blake2b

from fabric.broker.cost import times_s
from fabric.broker.facts import ReplicaSnapshot
from fabric.broker.lengths import Lengths
from fabric.broker.progress import Progress
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import Outcome
from fabric.errors import DeadlineExceeded, FabricError, StreamBroken
from fabric.messages import RunCompleted, RunState, Usage

BACKOFF_S = 0.2
SILENCE_FACTOR = 4.0


def get_outcome(
    run: Progress,
    now: float,
    state: RunState,
    usage: Usage,
    charge_usu: int,
    failure_code: str | None,
) -> Outcome:
    """Return the end of a run at ``now``, as it is settled and recorded."""
    return Outcome(
        ticket=run.ticket,
        state=state,
        placement=run.placement,
        attempts=run.num_sent,
        usage=usage,
        charge_usu=charge_usu,
        first_token_s=since_start_s(run),
        total_s=now - run.started_at,
        failure_code=failure_code,
        first_s=_first_s(run),
        token_s=_token_s(run),
    )


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


def silent_until(
    run: Progress,
    chosen: ReplicaSnapshot,
    now: float,
    settings: BrokerSettings,
    lengths: Lengths,
) -> float:
    """Return when a replica that streams is given up for a run if it says nothing."""
    expected_s = times_s(run.ticket.request, chosen, lengths).total_s
    return now + max(settings.first_token_timeout_s, SILENCE_FACTOR * expected_s)


def backoff_s(run: Progress) -> float:
    """Return a pause with full jitter that is the same for the same run and attempt."""
    drawn = blake2b(f"{run.ticket.request.id}/{run.attempt}".encode(), digest_size=4).digest()
    return float(BACKOFF_S * 2**run.attempt * int.from_bytes(drawn) / 2**32)
