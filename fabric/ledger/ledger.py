"""The ledger: every method is one transaction, or part of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal

from sqlalchemy.exc import IntegrityError

from fabric.errors import Duplicate, UnknownAccount
from fabric.ledger import allocations, audit, holds, jobs, rates, statement
from fabric.ledger.posting import check_amount
from fabric.ledger.rates import Rate
from fabric.ledger.records import AllocationBalance, Hold, JobCharge, Settlement, Statement
from fabric.sql import Database, utc_now


class Ledger:
    """Allocations, holds, charges and rates over one database.

    Amounts are integer micro-SU. An allocation is named ``allocation:<project>:<site>``; the site
    ``*`` stands for any. What is granted comes from ``grants``, what is held for running work is in
    ``held:<allocation>``, what was charged is in ``income:<site>``.

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
        starts_at: datetime | None = None,
        ends_at: datetime | None = None,
    ) -> str:
        """Create an empty allocation and return its name.

        Raises:
            Duplicate: The project has one at this site.
            RequestInvalid: A name holds a colon, or the times are in the wrong order.
        """
        with self._database.transaction() as connection:
            return allocations.open_allocation(connection, project, site, starts_at, ends_at)

    def modify_allocation(
        self, name: str, *, starts_at: datetime | None = None, ends_at: datetime | None = None
    ) -> None:
        """Change when an allocation is open; ``None`` leaves a time as it is.

        Raises:
            UnknownAccount: There is no such allocation.
            RequestInvalid: The times are in the wrong order.
        """
        with self._database.transaction() as connection:
            allocations.set_times(connection, name, starts_at, ends_at)

    def grant(self, allocation: str, amount_usu: int, *, memo: str = "") -> None:
        """Add an amount to an allocation.

        Raises:
            UnknownAccount: There is no such allocation.
            RequestInvalid: The amount is not positive, or over 1e15.
        """
        check_amount(amount_usu, least=1)
        with self._database.transaction() as connection:
            allocations.grant(connection, allocation, amount_usu, self._clock(), memo)

    def withdraw(self, allocation: str, amount_usu: int, *, memo: str = "") -> None:
        """Take an amount that is not held back out of an allocation.

        Raises:
            UnknownAccount: There is no such allocation.
            InsufficientBalance: Less is available.
            RequestInvalid: The amount is not positive, or over 1e15.
        """
        check_amount(amount_usu, least=1)
        with self._database.transaction() as connection:
            allocations.grant(connection, allocation, -amount_usu, self._clock(), memo)

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
        try:
            with self._database.transaction() as connection:
                return holds.open_hold(
                    connection, hold_id, allocation, amount_usu, lease_s, self._clock()
                )
        except IntegrityError as error:
            # Only PostgreSQL lets another hub make the same hold between our look and our insert.
            raise Duplicate(kind="hold", name=hold_id) from error

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
        with self._database.transaction() as connection:
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
        with self._database.transaction() as connection:
            holds.void(connection, hold_id, self._clock())

    def release_expired(self, now: datetime | None = None) -> list[str]:
        """Return all holds whose lease has passed, and their ids: a killed hub left them."""
        with self._database.transaction() as connection:
            return holds.release_expired(connection, now or self._clock())

    # Records

    def statement(
        self,
        project: str,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 1000,
    ) -> Statement:
        """Return what a project was granted and charged: the newest lines of a period.

        Args:
            project: Whose.
            since: The first time included; from the start by default.
            until: The first time no longer included; to the end by default.
            limit: At most so many lines.
        """
        with self._database.read() as connection:
            return statement.statement(connection, project, since=since, until=until, limit=limit)

    def note_job(self, job: JobCharge) -> JobCharge:
        """Note what a machine charges for a job, as a memo; return what is noted of it.

        It moves no balance. The first time counts: the same job again changes nothing.

        Raises:
            UnknownAccount: The project has no allocation at the job's site.
        """
        key = (job.project, job.launch, job.job_id)
        try:
            with self._database.transaction() as connection:
                if (known := jobs.find(connection, *key)) is not None:
                    return known
                allocation = f"allocation:{job.project}:{job.site}"
                jobs.note(connection, job, allocation=allocation, at=self._clock())
        except IntegrityError:
            # Only PostgreSQL lets another hub note it between our look and our insert.
            with self._database.read() as connection:
                if (known := jobs.find(connection, *key)) is None:
                    raise
            return known
        return job

    def job_charges(
        self, project: str | None = None, *, launch: str | None = None
    ) -> list[JobCharge]:
        """Return what machines charge for jobs, of a project or all, in the order noted."""
        with self._database.read() as connection:
            return jobs.listed(connection, project, launch)

    def verify(self) -> None:
        """Recompute all balances from the entries.

        Raises:
            LedgerInconsistent: Something does not add up.
        """
        with self._database.read() as connection:
            audit.verify(connection)

    # Rates

    def set_rate(
        self,
        model: str,
        site: str,
        *,
        prompt_usu: int | Decimal,
        cached_prompt_usu: int | Decimal,
        output_usu: int | Decimal,
        hook_in_usu: int | Decimal = 0,
        hook_out_usu: int | Decimal = 0,
        device_usu: int | Decimal = 0,
        effective_from: datetime | None = None,
    ) -> Rate:
        """Set what tokens cost from a time on (now, by default), in micro-SU per token.

        Args:
            model: A version (``name@revision``), a name, or ``*`` for every other.
            site: A site, or ``*`` for every other.
            prompt_usu: For an uncached prompt token; at most six decimal places.
            cached_prompt_usu: For a cached prompt token.
            output_usu: For a generated token.
            hook_in_usu: For a byte of a program's constants.
            hook_out_usu: For a byte that a program saved.
            device_usu: For a second that a program computed.
            effective_from: When it starts. Charges already made stay as they are.

        Raises:
            Duplicate: There is a rate from this very time on.
            RequestInvalid: A price is negative, over 1e9 or too finely divided.
        """
        rate = Rate(
            model=model,
            site=site,
            effective_from=effective_from or self._clock(),
            prompt_usu=Decimal(prompt_usu),
            cached_prompt_usu=Decimal(cached_prompt_usu),
            output_usu=Decimal(output_usu),
            hook_in_usu=Decimal(hook_in_usu),
            hook_out_usu=Decimal(hook_out_usu),
            device_usu=Decimal(device_usu),
        )
        try:
            with self._database.transaction() as connection:
                rates.insert_rate(connection, rate)
        except IntegrityError as error:
            raise Duplicate(
                kind="rate", name=f"{model} at {site} from {rate.effective_from.isoformat()}"
            ) from error
        return rate

    def rate(self, model: str, site: str, at: datetime | None = None) -> Rate:
        """Return what tokens cost at a time (now, by default).

        The closest match counts: the model's version, then its name, then ``*``; within it the
        site, then ``*``; within that the newest.

        Raises:
            RateMissing: None matches; the default is a rate of model ``*`` at site ``*``.
        """
        with self._database.read() as connection:
            return rates.find_rate(connection, model, site, at or self._clock())
