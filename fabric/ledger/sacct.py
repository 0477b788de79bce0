"""What Slurm's ``sacct`` says of jobs that have ended."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction

from fabric.errors import RequestInvalid
from fabric.ledger.reconcile import EndedJob
from fabric.ledger.units import Unit

COMMAND = "SLURM_TIME_FORMAT=%s sacct -X -P -n -o JobIDRaw,State,Start,End,AllocTRES"
"""Prints what is read here: times as seconds since 1970, one line a job.

Source: sacct(1), "ENVIRONMENT VARIABLES" and "--parsable2".
"""

_RUNNING = frozenset({"PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "CONFIGURING", "COMPLETING"})


def read_sacct(text: str, site: str, unit: Unit, *, tres: str = "node") -> Iterator[EndedJob]:
    """Yield the jobs that ran and ended, with their charges.

    A charge is ``tres x hours`` in the unit, rounded up to a whole micro-SU.

    Args:
        text: The output of ``COMMAND``.
        site: Where the jobs ran.
        unit: What an hour of one of ``tres`` is worth: a centre's node-hour, say.
        tres: What is charged, as ``AllocTRES`` names it: ``node``, ``gres/gpu``, ``billing``.

    Raises:
        RequestInvalid: A line is not of that form, or a job has none of ``tres``.
    """
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = line.split("|")
        if len(fields) != 5:
            raise _unreadable(line, f"it has {len(fields)} fields instead of 5")
        job, state, started, ended, allocated = fields
        if state.split(" ")[0] in _RUNNING or not (started.isdigit() and ended.isdigit()):
            if "T" in started + ended:
                raise _unreadable(line, "its times are no seconds since 1970")
            continue  # it has not ended, or never started
        counts = dict(part.partition("=")[::2] for part in allocated.split(",") if part)
        try:
            num = int(counts[tres])
            started_at, ended_at = (datetime.fromtimestamp(int(t), UTC) for t in (started, ended))
        except (KeyError, ValueError, OverflowError, OSError) as error:
            reason = f"its AllocTRES tells no number of {tres!r}, or its times are none"
            raise _unreadable(line, reason) from error
        hours = Fraction(max(0, int(ended) - int(started)), 3600)
        yield EndedJob(
            site=site,
            job=job,
            charge_usu=unit.to_usu(num * hours, up=True),
            started_at=started_at,
            ended_at=ended_at,
        )


def _unreadable(line: str, reason: str) -> RequestInvalid:
    return RequestInvalid(
        param="sacct", value=line[:200], reason=f"{reason}; the output of `{COMMAND}` is read"
    )
