"""What a scheduler says of jobs: waiting and why, running since when, ended and how."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

from fabric.errors import SchedulerFailed
from fabric.launch.jobs.commands import run, try_run

Scheduler = Literal["local", "slurm", "pbspro"]


class JobPhase(StrEnum):
    """Where a job is, whatever its scheduler calls it."""

    QUEUED = "queued"
    """It waits for nodes."""
    RUNNING = "running"
    """It has its nodes."""
    ENDED = "ended"
    """It is over: by itself, by a command, or by its walltime."""
    UNKNOWN = "unknown"
    """The scheduler does not know it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job at one moment.

    ``word`` is the scheduler's own (``TIMEOUT``, ``NODE_FAIL``); ``reason`` says why it waits;
    ``start_at`` is when the scheduler expects it to start; ``position`` counts the jobs that wait
    before it in its queue.
    """

    phase: JobPhase
    word: str = ""
    reason: str = ""
    start_at: datetime | None = None
    position: int | None = None


_SLURM_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"}
_SLURM_RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED"}
_PBS_QUEUED = set("QHWTS")
_PBS_RUNNING = set("REB")


def get_states(scheduler: Scheduler, job_ids: Sequence[str]) -> dict[str, JobState]:
    """Ask a scheduler for the states of jobs.

    Raises:
        SchedulerFailed: It does not answer; the jobs may go on all the same.
    """
    if not job_ids:
        return {}
    match scheduler:
        case "slurm":
            return _ask_slurm(job_ids)
        case "pbspro":
            return _ask_pbs(job_ids)
        case "local":
            return {job_id: _ask_local(job_id) for job_id in job_ids}


def parse_squeue(output: str) -> dict[str, JobState]:
    """Return the jobs of ``squeue -h -o '%i|%T|%r|%S'``, in the order of their priority."""
    states: dict[str, JobState] = {}
    num_waiting = 0
    for line in output.splitlines():
        job_id, word, reason, start = (*line.strip().split("|"), "", "", "")[:4]
        if word in _SLURM_QUEUED:
            states[job_id] = JobState(
                phase=JobPhase.QUEUED,
                word=word,
                reason="" if reason == "None" else reason,
                start_at=_time(start),
                position=num_waiting,
            )
            num_waiting += 1
        elif word:
            phase = JobPhase.RUNNING if word in _SLURM_RUNNING else JobPhase.ENDED
            states[job_id] = JobState(phase=phase, word=word, start_at=_time(start))
    return states


def parse_scontrol(output: str) -> JobState:
    """Return the state that ``scontrol -o show job`` tells of one job."""
    fields = dict(part.split("=", 1) for part in output.split() if "=" in part)
    word = fields.get("JobState", "")
    if not word:
        return JobState(phase=JobPhase.UNKNOWN)
    if word in _SLURM_QUEUED | _SLURM_RUNNING:
        phase = JobPhase.QUEUED if word in _SLURM_QUEUED else JobPhase.RUNNING
    else:
        phase = JobPhase.ENDED
    reason = fields.get("Reason", "")
    code = fields.get("ExitCode", "0:0")
    ended = f"exit code {code}" if phase is JobPhase.ENDED and code != "0:0" else ""
    return JobState(
        phase=phase,
        word=word,
        reason="" if reason in ("None", "") else reason if not ended else f"{reason}, {ended}",
        start_at=_time(fields.get("StartTime", "")),
    )


def parse_qstat(output: str) -> dict[str, JobState]:
    """Return the jobs of ``qstat -x -f -F json``."""
    states = {}
    for job_id, job in json.loads(output).get("Jobs", {}).items():
        letter = str(job.get("job_state", ""))
        phase = (
            JobPhase.QUEUED
            if letter in _PBS_QUEUED
            else JobPhase.RUNNING
            if letter in _PBS_RUNNING
            else JobPhase.ENDED
        )
        code = job.get("Exit_status")
        reason = str(job.get("comment", ""))
        if phase is JobPhase.ENDED and code is not None:
            reason = f"exit status {code}"
        estimated = job.get("estimated")
        told = estimated.get("start_time") if isinstance(estimated, dict) else None
        states[job_id] = JobState(
            phase=phase,
            word=letter,
            reason=reason,
            start_at=_pbs_time(job.get("stime") or told),
        )
    return states


def _ask_slurm(job_ids: Sequence[str]) -> dict[str, JobState]:
    queue = run("squeue", "-h", "-a", "-o", "%i|%T|%r|%S", "--sort=-p,i")
    known = parse_squeue(queue)
    states = {}
    for job_id in job_ids:
        state = known.get(job_id)
        if state is None or state.phase is JobPhase.ENDED:
            done = try_run("scontrol", "-o", "show", "job", job_id)
            if done.returncode and "Invalid job id" not in done.stderr:
                raise SchedulerFailed(command="scontrol show job", reason=done.stderr.strip())
            state = parse_scontrol(done.stdout)
        states[job_id] = state
    return states


def _ask_pbs(job_ids: Sequence[str]) -> dict[str, JobState]:
    done = try_run("qstat", "-x", "-f", "-F", "json", *job_ids)
    try:
        known = parse_qstat(done.stdout)
    except ValueError as error:
        reason = done.stderr.strip() or "its answer is not JSON"
        raise SchedulerFailed(command="qstat -x -f -F json", reason=reason) from error
    unknown = JobState(phase=JobPhase.UNKNOWN)
    return {job_id: _of(known, job_id) or unknown for job_id in job_ids}


def _of(known: dict[str, JobState], job_id: str) -> JobState | None:
    """Find a job by its id, with which or without which server it is on."""
    short = job_id.split(".")[0]
    return next((state for full, state in known.items() if full.split(".")[0] == short), None)


def _ask_local(job_id: str) -> JobState:
    try:
        os.kill(int(job_id), 0)
    except (ProcessLookupError, ValueError):
        return JobState(phase=JobPhase.ENDED)
    return JobState(phase=JobPhase.RUNNING)


def _pbs_time(text: object) -> datetime | None:
    """Return a time as PBS writes it (``Tue Oct 11 08:13:45 2022``), in this machine's zone."""
    try:
        return datetime.strptime(str(text), "%a %b %d %H:%M:%S %Y").astimezone()
    except ValueError:
        return None


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        return None
