"""What PBS Professional's ``qstat`` says of jobs that have ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from fractions import Fraction

from fabric.errors import RequestInvalid
from fabric.ledger.reconcile import EndedJob
from fabric.ledger.units import Unit

COMMAND = "qstat -x -f -F json"
"""Prints what is read here, of the jobs that the server still remembers.

Source: qstat(1B), "-x" and "-F json"; the attributes are those of pbs_job_attributes(7B).
"""


def read_qstat(text: str, site: str, unit: Unit, *, tres: str = "nodect") -> Iterator[EndedJob]:
    """Yield the jobs that ran and ended, with their charges.

    A charge is ``tres x hours`` in the unit, rounded up to a whole micro-SU; hours are those that
    the job used, without those it was suspended. A job ended when it became history, which is the
    one time that is told in seconds since 1970: all others are of the server's own time zone.

    Args:
        text: The output of ``COMMAND``.
        site: Where the jobs ran.
        unit: What an hour of one of ``tres`` is worth: a centre's node-hour, say.
        tres: What is charged, as ``Resource_List`` names it: ``nodect``, ``ngpus``, ``ncpus``.

    Raises:
        RequestInvalid: It is not of that form, or a job has none of ``tres``.
    """
    try:
        jobs = json.loads(text)["Jobs"] if text.strip() else {}
        records = [(str(name), dict(record)) for name, record in jobs.items()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(text, "it is no list of jobs in JSON") from error
    for name, record in records:
        used = record.get("resources_used")
        if record.get("job_state") != "F" or "stime" not in record or used is None:
            continue  # it has not ended, or never started
        try:
            num = int(record["Resource_List"][tres])
            ended_at = datetime.fromtimestamp(int(record["history_timestamp"]), UTC)
            seconds = _seconds(used)
            started_at = ended_at - timedelta(seconds=seconds)
        except (LookupError, TypeError, ValueError, OverflowError, OSError) as error:
            reason = f"its Resource_List tells no number of {tres!r}, or its times are none"
            raise _unreadable(f"{name}: {record}", reason) from error
        yield EndedJob(
            site=site,
            job=name,
            charge_usu=unit.to_usu(num * Fraction(seconds, 3600), up=True),
            started_at=started_at,
            ended_at=ended_at,
        )


def _seconds(used: Mapping[str, object]) -> int:
    """Return the walltime that was used; hours have as many digits as they need."""
    hours, minutes, seconds = (int(part) for part in str(used["walltime"]).split(":"))
    if min(hours, minutes, seconds) < 0:
        raise ValueError(used["walltime"])
    return 3600 * hours + 60 * minutes + seconds


def _unreadable(value: str, reason: str) -> RequestInvalid:
    return RequestInvalid(
        param="qstat", value=value[:200], reason=f"{reason}; the output of `{COMMAND}` is read"
    )
