"""Reconciliation: what a centre charged for jobs, beside what was billed for the work done in them.

The difference is overhead: loading, idling, and all that no request paid for; below zero it is a
surplus. A charge belongs to the job that its instance was in. Where that is not known it belongs to
the jobs of its site that ran when it was made, in proportion to what they cost a second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

GRACE = timedelta(minutes=2)
"""How long after its job a charge may be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedJob:
    """A job that has ended, and what its centre charged for it."""

    site: str
    job: str
    charge_usu: int
    started_at: datetime
    ended_at: datetime

    def ran(self, at: datetime) -> bool:
        """Whether it ran then, or had just ended."""
        return self.started_at <= at < self.ended_at + GRACE

    @property
    def usu_per_s(self) -> float:
        """What it cost a second."""
        return self.charge_usu / max(1.0, (self.ended_at - self.started_at).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class Billed:
    """What was charged for work at a site; ``job`` is where it was done, if that is known."""

    site: str
    at: datetime
    amount_usu: int
    job: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """One job's charge, what was billed in it, and the difference."""

    job: EndedJob
    billed_usu: int

    @property
    def amount_usu(self) -> int:
        """What nobody paid for; negative where more was billed than the job cost."""
        return self.job.charge_usu - self.billed_usu


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """The overheads of jobs, in the order in which they started; ``unattributed_usu`` was billed
    when no job ran."""

    overheads: tuple[Overhead, ...]
    unattributed_usu: int


def reconcile(jobs: Iterable[EndedJob], billed: Iterable[Billed]) -> Reconciliation:
    """Return each job's overhead. What was billed is divided whole: nothing is lost or doubled.

    A job that is told twice counts once.
    """
    known = {(job.site, job.job): job for job in jobs}
    at_site: dict[str, list[EndedJob]] = defaultdict(list)
    for job in sorted(known.values(), key=lambda job: (job.started_at, job.site, job.job)):
        at_site[job.site].append(job)
    sums = dict.fromkeys(known, 0)
    unattributed_usu = 0
    for one in billed:
        if (one.site, one.job) in known:
            sums[one.site, str(one.job)] += one.amount_usu
            continue
        here = at_site.get(one.site, ())
        so_far = here[: bisect_right(here, one.at, key=lambda job: job.started_at)]
        running = [job for job in so_far if job.ran(one.at)]
        if one.job is not None or not running:
            unattributed_usu += one.amount_usu
            continue
        for job, part_usu in zip(running, _divide(one.amount_usu, running), strict=True):
            sums[job.site, job.job] += part_usu
    overheads = [
        Overhead(job=job, billed_usu=sums[job.site, job.job])
        for job in sorted(known.values(), key=lambda job: (job.started_at, job.site, job.job))
    ]
    return Reconciliation(overheads=tuple(overheads), unattributed_usu=unattributed_usu)


def _divide(amount_usu: int, jobs: Sequence[EndedJob]) -> list[int]:
    """Return the jobs' parts, which sum to the amount; the last job has what rounding leaves."""
    total = sum(job.usu_per_s for job in jobs)
    weights = [job.usu_per_s / total if total else 1 / len(jobs) for job in jobs]
    parts_usu = [int(amount_usu * weight) for weight in weights[:-1]]
    return [*parts_usu, amount_usu - sum(parts_usu)]
