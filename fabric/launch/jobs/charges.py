"""What ended jobs took and cost, and whether the hub has it in its books."""

from __future__ import annotations

from datetime import datetime

from fabric.config import SiteSpec
from fabric.launch.jobs.accounting import JobUsage, get_charge
from fabric.launch.jobs.order import Order
from fabric.launch.jobs.records import JobRecord, LaunchRecord

PATIENCE_S = 120.0
"""A machine's books may lag; after so long the launcher's own clock stands for them."""

NODE_HOURS = "node-hour"
"""What is told where the site's file does not say what a node's hour costs."""


class JobAccounts:
    """The accounts of one launch's jobs.

    Args:
        order: What the jobs are for.
        site: The machine; one without a scheduler charges nothing.
        queue: Where they run.
    """

    def __init__(self, order: Order, site: SiteSpec, queue: str | None) -> None:
        self._order = order
        self._system = site.system
        self._queue = queue

    def wants(self, job: JobRecord) -> bool:
        """Return whether it is still to be asked what a job took."""
        charges = self._system is not None and self._system.scheduler != "local"
        return charges and not job.open and job.job_id is not None and job.usage is None

    def owes(self, job: JobRecord) -> bool:
        """Return whether the hub is still to be told what an ended job took."""
        return self.wants(job) or (job.usage is not None and not job.is_told)

    def settle(self, job: JobRecord, told: JobUsage | None, now: datetime) -> JobRecord:
        """Return an ended job's record with what it took, once that is known.

        Args:
            job: The record.
            told: What the scheduler tells.
            now: The time.
        """
        assert job.ended_at is not None
        if not self.wants(job):
            return job
        if told is None and (now - job.ended_at).total_seconds() < PATIENCE_S:
            return job
        usage = told or self._get_own(job)
        charge, unit = self._get_charge(usage)
        return job.model_copy(update={"usage": usage, "charge": charge, "unit": unit})

    def _get_own(self, job: JobRecord) -> JobUsage:
        elapsed_s = 0.0
        if job.started_at is not None and job.ended_at is not None:
            elapsed_s = max(0.0, (job.ended_at - job.started_at).total_seconds())
        return JobUsage(elapsed_s=elapsed_s, num_nodes=self._order.nodes, source="launcher")

    def _get_charge(self, usage: JobUsage) -> tuple[float, str]:
        if usage.elapsed_s == 0.0:  # it never had its nodes; a least charge is not for such jobs
            return 0.0, NODE_HOURS
        if self._system is not None and self._system.charge is not None:
            queue = self._system.queues.get(self._queue) if self._queue else None
            charge = get_charge(
                self._system, queue, num_nodes=usage.num_nodes, elapsed_s=usage.elapsed_s
            )
            if charge is not None:
                return charge, self._system.charge.unit
        return usage.num_nodes * usage.elapsed_s / 3600, NODE_HOURS


def describe(record: LaunchRecord, job: JobRecord) -> dict[str, object]:
    """Return what the hub is told of an ended job whose usage is known, as JSON."""
    assert job.usage is not None
    assert job.ended_at is not None
    return {
        "launch": record.name,
        "job_id": job.job_id,
        "account": record.order.account,
        "num_nodes": job.usage.num_nodes,
        "elapsed_s": job.usage.elapsed_s,
        "charge": job.charge,
        "unit": job.unit,
        "source": job.usage.source,
        "ended_at": job.ended_at.isoformat(),
    }
