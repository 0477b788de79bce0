"""Memo entries: what machines charge their own accounts for jobs that users bring.

They move no balance of the fabric's. One is a journal row without entries, so that statements list
it among the lines they explain, and a row that says what it was for.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from sqlalchemy import Connection, RowMapping, Select, bindparam, insert, select

from fabric.ledger.allocations import find_allocation
from fabric.ledger.posting import post
from fabric.ledger.records import JobCharge
from fabric.ledger.tables import job_charges, journal

_MILLIONTHS = 1_000_000
_BY_JOB = select(job_charges).where(
    job_charges.c.project == bindparam("of_project"),
    job_charges.c.launch == bindparam("of_launch"),
    job_charges.c.job_id == bindparam("of_job"),
)
_ENTRY = select(journal.c.id).where(journal.c.key == bindparam("of_key"))


def find(connection: Connection, project: str, launch: str, job_id: str) -> JobCharge | None:
    """Return what was noted of a job, if anything was."""
    key = {"of_project": project, "of_launch": launch, "of_job": job_id}
    row = connection.execute(_BY_JOB, key).first()
    return None if row is None else _to_charge(row._mapping)


def note(connection: Connection, job: JobCharge, at: datetime) -> JobCharge:
    """Store what a job took, and return what is stored of it. See ``Ledger.note_job``."""
    if (known := find(connection, job.project, job.launch, job.job_id)) is not None:
        return known
    allocation = f"allocation:{job.project}:{job.site}"
    key = f"job:{job.project}:{job.launch}:{job.job_id}"
    post(
        connection,
        {},
        kind="memo",
        at=at,
        allocation_id=find_allocation(connection, allocation).id,
        key=key,
        site=job.site,
        model=job.model,
        memo=describe(job),
    )
    values = {name: getattr(job, name) for name in _FIELDS}
    millionths = int((job.charge * _MILLIONTHS).to_integral_value())
    journal_id = connection.execute(_ENTRY, {"of_key": key}).scalar_one()
    row = values | {"journal_id": journal_id, "charge_millionths": millionths}
    connection.execute(insert(job_charges), row)
    return job


def listed(connection: Connection, project: str | None, launch: str | None) -> list[JobCharge]:
    """Return jobs, oldest first. See ``Ledger.job_charges``."""
    query: Select[tuple[object, ...]] = select(job_charges).order_by(job_charges.c.journal_id)
    if project is not None:
        query = query.where(job_charges.c.project == project)
    if launch is not None:
        query = query.where(job_charges.c.launch == launch)
    return [_to_charge(row._mapping) for row in connection.execute(query)]


def describe(job: JobCharge) -> str:
    """Return a job's memo: ``job 4711 of l-1a2b3c4d: 0.5 node-hours of m1234 (2 nodes, 900 s)``."""
    of = f" of {job.account}" if job.account else ""
    nodes = "1 node" if job.num_nodes == 1 else f"{job.num_nodes} nodes"
    amount = f"{job.charge:,.4g} {job.unit}s{of}"
    return f"job {job.job_id} of {job.launch}: {amount} ({nodes}, {job.elapsed_s:.0f} s)"


_FIELDS = (
    *("project", "launch", "job_id", "site", "instance", "model", "account"),
    *("num_nodes", "elapsed_s", "unit", "source", "ended_at"),
)


def _to_charge(row: RowMapping) -> JobCharge:
    charge = Decimal(int(row["charge_millionths"])) / _MILLIONTHS
    return JobCharge(**{name: row[name] for name in _FIELDS}, charge=charge)
