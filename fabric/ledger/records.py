"""What the ledger answers with. Amounts are integer micro-SU, times are UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Literal

LineKind = Literal[
    "grant", "withdrawal", "share", "return", "exchange", "charge", "refund", "expiry", "memo"
]
"""What changes what an allocation owns, or is noted beside it; holds only move it between its own
accounts."""


class HoldState(StrEnum):
    """Where a hold is in its life; all but the first are final."""

    OPEN = "open"
    """Its amount is set aside."""
    SETTLED = "settled"
    """A charge was taken from it and the rest returned."""
    VOIDED = "voided"
    """All of it was returned."""
    EXPIRED = "expired"
    """Nobody renewed its lease; all of it was returned."""


def is_open(starts_at: datetime | None, ends_at: datetime | None, at: datetime) -> bool:
    """Return whether a period without (``None``) or with a start and an end includes a time."""
    return (starts_at is None or starts_at <= at) and (ends_at is None or at < ends_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationBalance:
    """One allocation of a project at one site (``*``: at any) and what it has.

    ``available_usu`` can be held by new requests, ``held_usu`` is set aside for running ones;
    their sum is what the project owns. ``period`` tells it from others of the same project and
    site. A share of the allocation ``parent`` is spent by its ``holder`` alone: the id of a key, or
    ``globus:`` and a user's.
    """

    name: str
    project: str
    site: str
    period: str | None = None
    holder: str | None = None
    parent: str | None = None
    available_usu: int
    held_usu: int
    starts_at: datetime | None
    ends_at: datetime | None

    def is_open(self, at: datetime) -> bool:
        """Whether the allocation may be used at a time."""
        return is_open(self.starts_at, self.ends_at, at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """An amount set aside for one run."""

    id: str
    allocation: str
    amount_usu: int
    state: HoldState
    lease_expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What was charged of a hold, and what went back to its allocation."""

    hold_id: str
    allocation: str
    site: str
    charged_usu: int
    returned_usu: int
    settled_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """What was given back of a run's charge, and what is left of that."""

    run: str
    allocation: str
    refunded_usu: int
    charged_usu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementLine:
    """One change of what a project owns.

    ``amount_usu`` is positive for what came and negative (or 0) for what went; ``balance_usu`` is
    what the allocation had after it, held amounts included. ``run``, ``site`` and ``model`` are
    those of a charge; a refund ``mends`` the charge whose ``entry`` that is. A memo changes
    nothing: it tells what the machine itself charges for ``job``.
    """

    entry: int
    at: datetime
    kind: LineKind
    allocation: str
    amount_usu: int
    balance_usu: int
    run: str | None
    site: str | None
    model: str | None
    memo: str
    mends: int | None = None
    job: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCharge:
    """What a machine charges for a job that a project has brought; the fabric charges nothing.

    Args:
        project: Whose job.
        launch: Which of its launches, and ``job_id`` the scheduler's id in it.
        job_id: The scheduler's id.
        site: The machine as the project's place to run.
        instance: What ran in it.
        model: As ``name@revision``.
        account: Of the machine's; ``None``: the user's default there.
        num_nodes: Nodes that it had.
        elapsed_s: For so many seconds.
        charge: In ``unit``, the machine's own; exact to a millionth.
        unit: In the singular, as ``node-hour``.
        source: Who says how long it took: ``sacct``, ``scontrol``, ``qstat`` or ``launcher``.
        ended_at: When it ended.
    """

    project: str
    launch: str
    job_id: str
    site: str
    instance: str
    model: str
    account: str | None
    num_nodes: int
    elapsed_s: float
    charge: Decimal
    unit: str
    source: str
    ended_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A project's lines in order of time, oldest first, and its allocations as they are now.

    Within an allocation each line's balance is the one before it plus the line's amount.
    ``complete`` is false where older lines of the period were left out by the limit.
    """

    project: str
    lines: tuple[StatementLine, ...]
    allocations: tuple[AllocationBalance, ...]
    complete: bool
