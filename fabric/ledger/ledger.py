"""The ledger: every method is one transaction, or part of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Concatenate, ParamSpec, TypeVar, Unpack

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from fabric.errors import Duplicate, UnknownAccount
from fabric.ledger import (
    allocations,
    audit,
    burn,
    holds,
    overhead,
    rates,
    statement,
    transfers,
    units,
)
from fabric.ledger import jobs as job_memos
from fabric.ledger.posting import check_amount
from fabric.ledger.rates import Prices, Rate
from fabric.ledger.reconcile import EndedJob, Reconciliation
from fabric.ledger.records import (
    AllocationBalance,
    Hold,
    JobCharge,
    Refund,
    Settlement,
    Statement,
)
from fabric.ledger.units import Unit
from fabric.sql import Database, utc_now

P = ParamSpec("P")
T = TypeVar("T")


class Ledger:
    """Allocations, holds, charges and rates over one database.

    Amounts are integer micro-SU. An allocation is named ``allocation:<project>:<site>``, with
    ``:<period>`` where it has one and ``/<holder>`` where it is a share; the site ``*`` stands for
    any. What is granted comes from ``grants``, what is held for running work is in
    ``held:<allocation>``, what was charged is in ``income:<site>``, what lapsed is in ``expired``.

    An entry that has a ``key`` is made once: the same call again changes nothing.

    Args:
        database: An open, migrated database.
        clock: The wall clock: leases outlive processes, so no monotonic one can count them.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    # Allocations

    def open_allocation(
        self,
        project: str,
        site: str,
        *,
        period: str | None = None,
        starts_at: datetime | None = None,
        ends_at: datetime | None = None,
    ) -> str:
        """Create an empty allocation and return its name.

        Args:
            project: Whose.
            site: Where it may be spent; ``*`` is anywhere.
            period: Tells it from other allocations of the project there, such as ``2027``.
            starts_at: When it opens.
            ends_at: When it closes; what is unused then lapses.

        Raises:
            Duplicate: The project has one at this site for this period.
            RequestInvalid: A name holds a colon or a slash, or the times are in the wrong order.
        """
        with self._database.transaction() as connection:
            return allocations.open_allocation(
                connection, project, site, period, starts_at, ends_at
            )

    def open_share(self, allocation: str, holder: str) -> str:
        """Create an empty share of an allocation, for one caller, and return its name.

        What is granted to it comes from what the allocation has available, and returns there.

        Args:
            allocation: What it is a share of.
            holder: Who spends it, and no longer the allocation: the id of a key, or ``globus:`` and
                a user's.

        Raises:
            UnknownAccount: There is no such allocation.
            Duplicate: The holder has one.
            RequestInvalid: The allocation is a share itself, or the holder has no name.
        """
        with self._database.transaction() as connection:
            return allocations.open_share(connection, allocation, holder)

    def modify_allocation(
        self, name: str, *, starts_at: datetime | None = None, ends_at: datetime | None = None
    ) -> None:
        """Change when an allocation and its shares are open; ``None`` leaves a time as it is.

        Raises:
            UnknownAccount: There is no such allocation.
            RequestInvalid: It is a share, or the times are in the wrong order.
        """
        with self._database.transaction() as connection:
            allocations.set_times(connection, name, starts_at, ends_at)

    def grant(
        self, allocation: str, amount_usu: int, *, key: str | None = None, memo: str = ""
    ) -> None:
        """Add an amount to an allocation, or to a share out of its allocation.

        Raises:
            UnknownAccount: There is no such allocation.
            InsufficientBalance: A share's allocation has less available.
            Duplicate: The key is another entry's.
            RequestInvalid: The amount is not positive, or over 1e15.
        """
        check_amount(amount_usu, least=1)
        self._twice(transfers.grant, allocation, amount_usu, self._clock(), key, memo)

    def withdraw(
        self, allocation: str, amount_usu: int, *, key: str | None = None, memo: str = ""
    ) -> None:
        """Take an amount that is not held back out of an allocation, or of a share into its own.

        Raises:
            UnknownAccount: There is no such allocation.
            InsufficientBalance: Less is available.
            Duplicate: The key is another entry's.
            RequestInvalid: The amount is not positive, or over 1e15.
        """
        check_amount(amount_usu, least=1)
        self._twice(transfers.grant, allocation, -amount_usu, self._clock(), key, memo)

    def exchange(
        self, source: str, target: str, amount_usu: int, *, key: str | None = None, memo: str = ""
    ) -> None:
        """Move an amount from one allocation of a project to another.

        Raises:
            UnknownAccount: One of them does not exist.
            AllocationClosed: One of them is not open.
            InsufficientBalance: The source has less available.
            Duplicate: The key is another entry's.
            RequestInvalid: They are not two allocations of one project, one is a share, or the
                amount is not positive or over 1e15.
        """
        check_amount(amount_usu, least=1)
        self._twice(transfers.exchange, source, target, amount_usu, self._clock(), key, memo)

    def expire(self, now: datetime | None = None) -> list[str]:
        """Take what is unused out of allocations whose time is over, and return their names.

        What is still held is left; what comes back of it lapses the next time.
        """
        with self._database.transaction() as connection:
            return transfers.expire(connection, now or self._clock())

    def allocations(self, project: str | None = None) -> list[AllocationBalance]:
        """Return the allocations of a project, or all, in order of name."""
        with self._database.read() as connection:
            return allocations.balances(connection, project=project)

    def allocation(self, name: str) -> AllocationBalance:
        """Return one allocation.

        Raises:
            UnknownAccount: There is none of this name.
        """
        with self._database.read() as connection:
            found = allocations.balances(connection, name=name)
        if not found:
            raise UnknownAccount(account=name)
        return found[0]

    def burn(self, project: str) -> Mapping[str, float]:
        """Return the micro-SU a day that each allocation of a project was charged of late: over the
        last seven days, or since its first charge in them, but over one day at least."""
        with self._database.read() as connection:
            return burn.burn_usu_per_day(connection, project, self._clock())

    def payers(
        self, project: str, caller: str, at: datetime | None = None
    ) -> list[AllocationBalance]:
        """Return what a caller of a project may spend now: its shares, and what it has none of."""
        with self._database.read() as connection:
            return allocations.payers(connection, project, caller, at or self._clock())

    # Holds

    def hold(self, hold_id: str, *, allocation: str, amount_usu: int, lease_s: float) -> Hold:
        """Set an amount aside before work starts. The same call again returns the same hold.

        Args:
            hold_id: The run's id.
            allocation: Where it is taken from.
            amount_usu: The most the run may cost.
            lease_s: Seconds after which it is released unless renewed.

        Raises:
            InsufficientBalance: Less is available.
            UnknownAccount: There is no such allocation.
            AllocationClosed: The allocation's time has not come or is over.
            Duplicate: An open hold of this id has another allocation or amount.
            HoldNotOpen: A hold of this id was settled, voided or released.
            RequestInvalid: The amount is negative or over 1e15.
        """
        check_amount(amount_usu)
        return self._twice(holds.open_hold, hold_id, allocation, amount_usu, lease_s, self._clock())

    def move_hold(self, hold_id: str, allocation: str, amount_usu: int) -> Hold:
        """Hold an amount in another allocation instead, for a run that goes on elsewhere.

        Raises:
            InsufficientBalance: The other allocation has less; the hold stays where it was.
            UnknownAccount: There is no such allocation.
            AllocationClosed: The allocation's time has not come or is over.
            HoldNotOpen: The hold is unknown or closed.
            RequestInvalid: The amount is negative or over 1e15.
        """
        check_amount(amount_usu)
        with self._database.transaction() as connection:
            return holds.move(connection, hold_id, allocation, amount_usu, self._clock())

    def renew(self, hold_ids: Sequence[str], lease_s: float) -> list[str]:
        """Let the leases of open holds end ``lease_s`` seconds from now; return which were open."""
        with self._database.transaction() as connection:
            return holds.renew(connection, hold_ids, lease_s, self._clock())

    def settle(
        self, hold_id: str, amount_usu: int, *, site: str, model: str | None = None, memo: str = ""
    ) -> Settlement:
        """Charge what a run cost and return the rest. The same call again changes nothing.

        Raises:
            ChargeExceedsHold: The amount is more than was held; nothing is charged.
            HoldNotOpen: The hold is unknown, was voided or released, or settled for another amount.
            RequestInvalid: The amount is negative or over 1e15.
        """
        check_amount(amount_usu)
        with self._database.joined() as connection:
            return holds.settle(
                connection,
                hold_id,
                amount_usu,
                site=site,
                model=model,
                memo=memo,
                now=self._clock(),
            )

    def void(self, hold_id: str) -> None:
        """Return all of a hold. Voiding it again, or after its release, changes nothing.

        Raises:
            HoldNotOpen: The hold is unknown or was settled.
        """
        with self._database.joined() as connection:
            holds.void(connection, hold_id, self._clock())

    def release_expired(self, now: datetime | None = None) -> list[str]:
        """Return all holds whose lease has passed, and their ids: a killed hub left them."""
        with self._database.transaction() as connection:
            return holds.release_expired(connection, now or self._clock())

    def charge(
        self, allocation: str, amount_usu: int, *, key: str, site: str, memo: str = ""
    ) -> None:
        """Charge what no run was held for, such as a day's storage.

        Raises:
            UnknownAccount: There is no such allocation.
            AllocationClosed: The allocation is not open.
            InsufficientBalance: Less is available.
            Duplicate: The key is another entry's.
            RequestInvalid: The amount is not positive, or over 1e15.
        """
        check_amount(amount_usu, least=1)
        self._twice(transfers.charge, allocation, amount_usu, self._clock(), key, site, memo)

    def refund(
        self, run: str, amount_usu: int | None = None, *, key: str | None = None, memo: str = ""
    ) -> Refund:
        """Give back of what a run was charged, by an entry that names the charge.

        Args:
            run: The hold that was settled.
            amount_usu: How much; all that is left of the charge by default.
            key: The refund's name.
            memo: Why.

        Raises:
            NotCharged: The run was not.
            RefundExceedsCharge: All refunds of the run would be more than its charge.
            Duplicate: The key is another entry's.
            RequestInvalid: The amount is not positive, or over 1e15.
        """
        if amount_usu is not None:
            check_amount(amount_usu, least=1)
        return self._twice(transfers.refund, run, amount_usu, self._clock(), key, memo)

    # Records

    def statement(
        self,
        project: str,
        *,
        allocation: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 1000,
    ) -> Statement:
        """Return what a project was granted and charged: the newest lines of a period.

        Args:
            project: Whose.
            allocation: Of this one only; of all by default.
            since: The first time included; from the start by default.
            until: The first time no longer included; to the end by default.
            limit: At most so many lines.
        """
        with self._database.read() as connection:
            return statement.statement(
                connection, project, allocation=allocation, since=since, until=until, limit=limit
            )

    def reconcile(self, site: str, jobs: Sequence[EndedJob]) -> Reconciliation:
        """Post what a centre charged for jobs beyond what was billed in them; return what was
        posted. A job that was told before is not posted again.

        Args:
            site: Where they ran.
            jobs: Those that ended; all that ran at the time, or others get what was billed in them.
        """
        return self._twice(overhead.post_overheads, site, jobs, self._clock())

    def note_job(self, job: JobCharge) -> JobCharge:
        """Note what a machine charges for a job, as a memo; return what is noted of it.

        It moves no balance. The first time counts: the same job again changes nothing.

        Raises:
            UnknownAccount: The project has no allocation at the job's site.
        """
        return self._twice(job_memos.note, job, self._clock())

    def job_charges(
        self, project: str | None = None, *, launch: str | None = None
    ) -> list[JobCharge]:
        """Return what machines charge for jobs, of a project or all, in the order noted."""
        with self._database.read() as connection:
            return job_memos.listed(connection, project, launch)

    def verify(self) -> None:
        """Recompute all balances from the entries.

        Raises:
            LedgerInconsistent: Something does not add up.
        """
        with self._database.read() as connection:
            audit.verify(connection)

    # Units and rates

    def set_unit(
        self, unit: str, usu: int | Decimal, *, effective_from: datetime | None = None
    ) -> Unit:
        """Say what a unit of other books is worth from a time on (now, by default).

        Args:
            unit: One word, such as ``node-hour``.
            usu: What one is worth, in micro-SU; at most six decimal places.
            effective_from: When it starts. What was exchanged before stays as it is.

        Raises:
            Duplicate: Its worth from this very time on is known.
            RequestInvalid: The name is not one word, or the worth not above 0 and at most 1e9.
        """
        made = Unit(name=unit, effective_from=effective_from or self._clock(), usu=Decimal(usu))
        try:
            with self._database.transaction() as connection:
                units.insert_unit(connection, made)
        except IntegrityError as error:
            name = f"{unit} from {made.effective_from.isoformat()}"
            raise Duplicate(kind="unit", name=name) from error
        return made

    def unit(self, unit: str, at: datetime | None = None) -> Unit:
        """Return what a unit is worth at a time (now, by default).

        Raises:
            UnknownUnit: Nobody has said.
        """
        with self._database.read() as connection:
            return units.find_unit(connection, unit, at or self._clock())

    def units(self) -> list[Unit]:
        """Return every worth of every unit, the newest of each first."""
        with self._database.read() as connection:
            return units.listed(connection)

    def set_rate(
        self,
        model: str,
        site: str,
        *,
        effective_from: datetime | None = None,
        **prices: Unpack[Prices],
    ) -> Rate:
        """Set prices from a time on (now, by default), in micro-SU.

        Args:
            model: A version (``name@revision``), a name, or ``*`` for every other.
            site: A site, or ``*`` for every other.
            effective_from: When it starts. Charges already made stay as they are.
            **prices: See ``Rate``; at most six decimal places.

        Raises:
            Duplicate: There is a rate from this very time on.
            RequestInvalid: A price is negative, over 1e9 or too finely divided.
        """
        rate = Rate(
            model=model,
            site=site,
            effective_from=effective_from or self._clock(),
            **{name: Decimal(price) for name, price in prices.items()},  # type: ignore[arg-type]
        )
        try:
            with self._database.transaction() as connection:
                rates.insert_rate(connection, rate)
        except IntegrityError as error:
            raise Duplicate(
                kind="rate", name=f"{model} at {site} from {rate.effective_from.isoformat()}"
            ) from error
        return rate

    def delete_rate(self, model: str, site: str, effective_from: datetime) -> None:
        """Take back a rate that is not in effect yet.

        Raises:
            NotFound: There is none from that time on.
            RequestInvalid: It is in effect.
        """
        with self._database.transaction() as connection:
            rates.delete_rate(connection, model, site, effective_from, self._clock())

    def rates(self) -> list[Rate]:
        """Return every rate there is or was or will be, the newest of each model and site first."""
        with self._database.read() as connection:
            return rates.listed(connection)

    def rate(self, model: str, site: str, at: datetime | None = None) -> Rate:
        """Return the prices at a time (now, by default).

        The closest match counts: the model's version, then its name, then ``*``; within it the
        site, then ``*``; within that the newest.

        Raises:
            RateMissing: None matches; the default is a rate of model ``*`` at site ``*``.
        """
        with self._database.read() as connection:
            return rates.find_rate(connection, model, site, at or self._clock())

    def _twice(
        self, write: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Write in a transaction, and again where another hub has just written the same.

        Only PostgreSQL lets it do so between our look and our insert; the second look finds it.
        """
        try:
            with self._database.transaction() as connection:
                return write(connection, *args, **kwargs)
        except IntegrityError:
            with self._database.transaction() as connection:
                return write(connection, *args, **kwargs)
