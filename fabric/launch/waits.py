"""How long a job would wait for its block: asked of the site's scheduler, never through a shell."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from fabric.errors import RequestInvalid, SchedulerFailed

TIMEOUT_S = 60.0
"""Schedulers of large machines take their time."""

RAW_CHARS = 4000

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+:-]{0,127}")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.&|,*()\[\]-]{0,255}")
_WALLTIME = re.compile(r"(\d{1,3}-)?\d{1,3}:\d{2}:\d{2}")
_COUNT = re.compile(r"[1-9]\d{0,5}")

_SLURM_OPTIONS = {
    "partition": ("--partition", _NAME),
    "account": ("--account", _NAME),
    "qos": ("--qos", _NAME),
    "reservation": ("--reservation", _NAME),
    "constraint": ("--constraint", _CONSTRAINT),
    "walltime": ("--time", _WALLTIME),
    "nodes": ("--nodes", _COUNT),
    "gpus_per_node": ("--gpus-per-node", _COUNT),
}
_PBS_OPTIONS = {"queue": ("", _NAME)}

_SLURM_START = re.compile(r"Job \d+ to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\b")
_PBS_JOB = re.compile(r"^\d+\S*\s.*\sQ\s+(\S+(?: \d\d)?)\s*$", re.MULTILINE)

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAYS = ("Mo", "Tu", "We", "Th", "Fr", "Sa", "Su")

Waits = dict[str, float | None]
"""Seconds at the quantiles ``p50`` and ``p90``; ``None`` where nobody knows."""


def estimate_wait(scheduler: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how long a job with these options would wait, by the scheduler's own estimate.

    Slurm is asked about the very job. PBS Professional is not able to say that without a
    submission: its estimates of the jobs that wait in the queue stand for it.

    Args:
        scheduler: ``local`` (where nothing waits), ``slurm`` or ``pbspro``.
        options: For Slurm: partition, account, qos, reservation, constraint, walltime, nodes,
            gpus_per_node. For PBS Professional: queue.

    Raises:
        RequestInvalid: The scheduler or an option is unknown, or an option's value is not of its
            form.
        SchedulerFailed: The command is not there, refuses the job, or says nothing.
    """
    match scheduler:
        case "local":
            _get_arguments(scheduler, options, {})
            return _answer({"p50": 0.0, "p90": 0.0}, "local", "")
        case "slurm":
            arguments = _get_arguments(scheduler, options, _SLURM_OPTIONS)
            output = _run("sbatch", "--test-only", *arguments, script="#!/bin/sh\ntrue\n")
            return _answer(parse_sbatch(output, datetime.now()), "sbatch --test-only", output)
        case "pbspro":
            arguments = _get_arguments(scheduler, options, _PBS_OPTIONS)
            output = _run("qstat", "-T", *arguments)
            return _answer(parse_qstat(output, datetime.now()), "qstat -T", output)
    reason = "the schedulers are local, slurm and pbspro"
    raise RequestInvalid(param="scheduler", value=scheduler, reason=reason)


def parse_sbatch(output: str, now: datetime) -> Waits:
    """Return the wait that ``sbatch --test-only`` tells.

    Args:
        output: What it wrote.
        now: The cluster's local time, in which it answers.

    Raises:
        SchedulerFailed: There is no start time in it.
    """
    found = _SLURM_START.search(output)
    if found is None:
        raise SchedulerFailed(command="sbatch --test-only", reason=_shown(output))
    wait_s = max(0.0, (datetime.fromisoformat(found[1]) - now).total_seconds())
    return {"p50": wait_s, "p90": wait_s}


def parse_qstat(output: str, now: datetime) -> Waits:
    """Return quantiles of the waits that ``qstat -T`` tells of the jobs in a queue.

    An empty queue has no wait. The nearer a start, the more exactly it is told; of a month or a
    year the earliest moment counts.

    Args:
        output: What it wrote.
        now: The cluster's local time, in which it answers.
    """
    starts = [_get_start(told, now) for told in _PBS_JOB.findall(output)]
    waits = sorted(
        math.inf if start is None else max(0.0, (start - now).total_seconds()) for start in starts
    )
    return {name: _get_quantile(waits, share) for name, share in (("p50", 0.5), ("p90", 0.9))}


def _get_start(told: str, now: datetime) -> datetime | None:
    """Return the earliest start that a cell means, or ``None`` if it is not known.

    Source: ``cnvt_est_start_time`` in OpenPBS's src/cmds/qstat.c.
    """
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if re.fullmatch(r"\d\d:\d\d", told):
        return today + timedelta(hours=int(told[:2]), minutes=int(told[3:]))
    if told[:2] in _DAYS and told[3:].isdigit():
        days = (_DAYS.index(told[:2]) - now.weekday()) % 7
        start = today + timedelta(days=days, hours=int(told[3:]))
        return start if start > now else start + timedelta(days=7)
    if told in _MONTHS:
        return today.replace(month=_MONTHS.index(told) + 1, day=1)
    if re.fullmatch(r"\d{4}", told):
        return datetime(int(told), 1, 1)
    if told == ">5yrs":
        return datetime(now.year + 5, 1, 1)
    return None


def _get_quantile(waits: Sequence[float], share: float) -> float | None:
    if not waits:
        return 0.0
    wait_s = waits[math.ceil(share * len(waits)) - 1]
    return None if math.isinf(wait_s) else wait_s


def _get_arguments(
    scheduler: str, options: Mapping[str, Any], known: Mapping[str, tuple[str, re.Pattern[str]]]
) -> list[str]:
    arguments = []
    for name, value in options.items():
        if name not in known:
            reason = f"{scheduler} is asked by {', '.join(known) or 'no option'} alone"
            raise RequestInvalid(param=f"options.{name}", value=value, reason=reason)
        flag, form = known[name]
        text = str(value) if type(value) in (str, int) else ""
        if not form.fullmatch(text):
            reason = f"it does not match {form.pattern}"
            raise RequestInvalid(param=f"options.{name}", value=value, reason=reason)
        arguments.append(f"{flag}={text}" if flag else text)
    return arguments


def _run(*command: str, script: str = "") -> str:
    """Return what a command wrote to both of its outputs.

    Raises:
        SchedulerFailed: It is not there, takes over a minute, or failed.
    """
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            input=script,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except OSError as error:
        reason = f"it cannot be run ({error.strerror})"
        raise SchedulerFailed(command=shown, reason=reason) from error
    except subprocess.TimeoutExpired as error:
        reason = f"it did not answer in {TIMEOUT_S:g} s"
        raise SchedulerFailed(command=shown, reason=reason) from error
    if done.returncode != 0:
        raise SchedulerFailed(command=shown, reason=_shown(done.stdout))
    return done.stdout


def _answer(waits: Waits, source: str, raw: str) -> dict[str, Any]:
    return {"wait_s": waits, "source": source, "raw": raw[:RAW_CHARS]}


def _shown(output: str) -> str:
    return output.strip()[:500].rstrip(".") or "it said nothing"
