"""Raw calls: admitted when their ticket is redeemed, charged by what their instance reports.

They run without the broker, which only sees their two ends. What a call may cost is held and
written down before it runs, so any hub of this database can close its books, once.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import timedelta

from fabric.auth import TicketRecord
from fabric.broker.admit import NOTHING_USED, Admission, Foresee
from fabric.broker.conclude import Conclusion
from fabric.broker.observe import Observer
from fabric.broker.programs import ProgramBounds
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import Outcome, Settle, Ticket, Void
from fabric.catalog import Catalog, RedemptionRecord
from fabric.errors import (
    Duplicate,
    HoldNotOpen,
    RequestCancelled,
    RequestInvalid,
    SessionLost,
    TicketSpent,
)
from fabric.ledger import Ledger, charge_usu, kv_block_s_bound
from fabric.messages import Metered, Placement, Request, RunState, Usage
from fabric.sql import utc_now
from fabric.sql.offload import Offload

REPORT_GRACE_S = 60.0
"""How long after its deadline a call may take to be reported."""

_RUN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """A call whose books are open."""

    instance: str
    due_s: float


class Metering:
    """Redeems tickets and settles what they paid for. Called on the broker's event loop."""

    def __init__(
        self,
        *,
        admission: Admission,
        conclusion: Conclusion,
        ledger: Ledger,
        catalog: Catalog,
        offload: Offload,
        settings: BrokerSettings,
        observer: Observer,
    ) -> None:
        self._admission = admission
        self._conclusion = conclusion
        self._ledger = ledger
        self._catalog = catalog
        self._offload = offload
        self._settings = settings
        self._observer = observer
        self._live: dict[str, _Live] = {}

    async def start(self) -> None:
        """Take over what a former hub admitted; what nobody renewed is returned."""
        now, now_s = utc_now(), time.monotonic()
        for one in await self._offload(self._catalog.open_redemptions):
            due_s = now_s + (one.due_at - now).total_seconds()
            self._live[one.run] = _Live(instance=one.instance, due_s=due_s)
        await self.release()

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._live

    async def redeem(
        self,
        ticket: TicketRecord,
        request: Request,
        *,
        instance: str,
        foresee: Foresee,
        bounds: ProgramBounds | None = None,
    ) -> None:
        """Admit a raw call and hold its largest charge.

        Args:
            ticket: Who pays; it was checked to be good at the instance's site.
            request: What is asked.
            instance: Where it will run.
            foresee: Returns the placement there, if it can be.
            bounds: Of a program, what it may take.

        Raises:
            RequestInvalid: The id is not one.
            Duplicate: There was a run of this id.
            TicketSpent: The ticket's calls would cost more than they may.
            FabricError: As ``Admission.admit`` does.
        """
        if not _RUN_ID.fullmatch(request.id):
            reason = "an id is 1 to 64 letters, digits, hyphens, underscores and points"
            raise RequestInvalid(param="id", value=request.id, reason=reason)
        identity = ticket.identity()
        due_s = request.deadline_s + REPORT_GRACE_S

        def write(admitted: Ticket) -> None:
            if self._catalog.redemption(request.id) is not None:
                raise Duplicate(kind="run", name=request.id)
            self._spend(ticket, admitted.held_usu)
            self._catalog.add_redemption(
                RedemptionRecord(
                    run=request.id,
                    ticket=ticket.id,
                    key_id=identity.key_id,
                    project=identity.project,
                    site=ticket.site,
                    instance=instance,
                    model=admitted.model,
                    digest=admitted.digest,
                    tier=request.tier,
                    prompt_tokens_bound=admitted.prompt_tokens_bound,
                    max_output_tokens=request.sampling.n * admitted.max_output_tokens,
                    max_hook_bytes_in=0 if bounds is None else bounds.hook_bytes_in,
                    max_hook_bytes_out=0 if bounds is None else bounds.hook_bytes_out,
                    max_device_s=0.0 if bounds is None else bounds.device_s,
                    program=admitted.program,
                    held_usu=admitted.held_usu,
                    created_at=admitted.created_at,
                    due_at=admitted.created_at + timedelta(seconds=due_s),
                )
            )

        self._admission.enter(request.id, identity)
        self._live[request.id] = _Live(instance=instance, due_s=time.monotonic() + due_s)
        try:
            admitted = await self._admission.admit(
                identity,
                _confined(request, ticket.site),
                foresee,
                scope="ticket",
                also=write,
                bounds=bounds,
            )
        except BaseException as error:
            self._forget(request.id)
            if isinstance(error, asyncio.CancelledError):
                # Its hold goes back; what may have been written of it meanwhile is closed too.
                self._offload(self._catalog.close_redemption, request.id, 0)
            if isinstance(error, HoldNotOpen):
                raise Duplicate(kind="run", name=request.id) from error
            raise
        self._observer.run_admitted(admitted.name, request)
        self._observer.run_placed(
            admitted.name, _placement(ticket.site, instance, admitted.digest), 1
        )

    async def settle(self, instance: str, metered: Metered) -> None:
        """Charge what a call consumed, at most what is held, and record its run.

        Said again it changes nothing. A call that this instance has no ticket for is logged and
        costs nothing.

        Raises:
            FabricError: It could not be written; the instance is to say it again.
        """
        outcome = await self._offload(self._write, instance, metered)
        if outcome is None:
            return
        self._forget(metered.task_id, outcome.usage)
        self._observe(outcome)

    def held_for(self, instances: Collection[str]) -> list[str]:
        """Return the calls whose holds are kept: they are not overdue, and their instance is one
        of these."""
        now_s = time.monotonic()
        return [
            run
            for run, live in self._live.items()
            if live.instance in instances and now_s < live.due_s
        ]

    async def release(self) -> None:
        """Return all holds that nobody renewed, and close the books on the raw calls of them."""
        released, lost = await self._offload(self._write_lost)
        if released:
            logger.warning("expired holds released", extra={"num_holds": len(released)})
        for outcome in lost:
            self._observe(outcome)
        for run in released:
            self._forget(run)

    def _forget(self, run: str, usage: Usage = NOTHING_USED) -> None:
        if self._live.pop(run, None) is not None:
            self._admission.leave(run, usage)

    def _observe(self, outcome: Outcome) -> None:
        if outcome.first_token_s is not None:
            self._observer.first_token(outcome.ticket.name, outcome.first_token_s)
        self._observer.run_ended(
            outcome.ticket.name,
            outcome.state,
            outcome.usage,
            e2e_s=outcome.total_s,
            charge_usu=outcome.charge_usu,
            failure_code=outcome.failure_code,
        )

    # ---- on the database's thread ---------------------------------------------------------------

    def _spend(self, ticket: TicketRecord, needed_usu: int) -> None:
        if ticket.max_usu is not None:
            left_usu = ticket.max_usu - self._catalog.committed_usu(ticket.id)
            if needed_usu > left_usu:
                raise TicketSpent(needed_usu=needed_usu, left_usu=left_usu)

    def _write(self, instance: str, metered: Metered) -> Outcome | None:
        with self._offload.database.transaction():
            redeemed = self._catalog.redemption(metered.task_id)
            where = {"run": metered.task_id, "instance": instance}
            if redeemed is None or redeemed.instance != instance:
                logger.warning("usage without a ticket is not charged", extra=where)
                return None
            if redeemed.charge_usu is not None:
                logger.info("usage of a run whose books are closed", extra=where)
                return None
            usage = _bounded(metered.usage, redeemed)
            rate = self._ledger.rate(redeemed.model, redeemed.site, redeemed.created_at)
            device_s = min(redeemed.max_device_s, usage.device_s)
            factors = self._admission.factors
            charge = charge_usu(rate, redeemed.tier, usage, device_s=device_s, factors=factors)
            charge = min(redeemed.held_usu, charge)
            outcome = _outcome(redeemed, metered, usage, charge)
            return self._close(redeemed, outcome)

    def _write_lost(self) -> tuple[list[str], list[Outcome]]:
        with self._offload.database.transaction():
            released = self._ledger.release_expired()
            if lapsed := self._ledger.expire():
                logger.info("unused amounts lapsed", extra={"allocations": lapsed})
            found = (self._catalog.redemption(run) for run in released)
            lost = [one for one in found if one is not None and one.charge_usu is None]
            return released, [self._close(one, _lost(one)) for one in lost]

    def _close(self, redeemed: RedemptionRecord, outcome: Outcome) -> Outcome:
        end: Settle | Void
        if outcome.usage == Usage():
            end = Void(run_id=redeemed.run, outcome=outcome)
        else:
            end = Settle(run_id=redeemed.run, site=redeemed.site, outcome=outcome)
        [charged_usu] = self._conclusion.write([end])
        self._catalog.close_redemption(redeemed.run, charged_usu)
        return replace(outcome, charge_usu=charged_usu)


def _confined(request: Request, site: str) -> Request:
    """Return the request as one for this site, unless it says itself that it may not run here."""
    if request.sites is not None and site not in request.sites:
        return request
    return request.model_copy(update={"sites": (site,)})


def _bounded(usage: Usage, redeemed: RedemptionRecord) -> Usage:
    """Return a reported usage cut to what was asked for, and to the time since then."""
    prompt_tokens = min(usage.prompt_tokens, redeemed.prompt_tokens_bound)
    row_tokens = redeemed.prompt_tokens_bound + redeemed.max_output_tokens
    life_s = (redeemed.due_at - redeemed.created_at).total_seconds()
    age_s = max(0.0, (utc_now() - redeemed.created_at).total_seconds())
    return usage.model_copy(
        update={
            "prompt_tokens": prompt_tokens,
            "cached_prompt_tokens": min(usage.cached_prompt_tokens, prompt_tokens),
            "output_tokens": min(usage.output_tokens, redeemed.max_output_tokens),
            "hook_bytes_in": min(usage.hook_bytes_in, redeemed.max_hook_bytes_in),
            "hook_bytes_out": min(usage.hook_bytes_out, redeemed.max_hook_bytes_out),
            "kv_block_s": min(usage.kv_block_s, kv_block_s_bound(1, row_tokens, life_s)),
            "adapter_s": 0.0,  # raw calls have none
            "queue_s": min(usage.queue_s, age_s),
            "device_s": min(usage.device_s, age_s),
        }
    )


def _outcome(redeemed: RedemptionRecord, metered: Metered, usage: Usage, charge: int) -> Outcome:
    states = {None: RunState.COMPLETED, RequestCancelled.code: RunState.CANCELLED}
    return Outcome(
        ticket=redeemed,
        state=states.get(metered.failure_code, RunState.FAILED),
        placement=_placement(redeemed.site, redeemed.instance, redeemed.digest),
        attempts=1,
        usage=usage,
        charge_usu=charge,
        first_token_s=metered.first_token_s,
        total_s=metered.total_s,
        failure_code=metered.failure_code,
    )


def _lost(redeemed: RedemptionRecord) -> Outcome:
    """Return the end of a call whose instance never said how it ended."""
    metered = Metered(
        task_id=redeemed.run,
        attempt=1,
        usage=Usage(),
        failure_code=SessionLost.code,
        total_s=max(0.0, (utc_now() - redeemed.created_at).total_seconds()),
    )
    return _outcome(redeemed, metered, Usage(), 0)


def _placement(site: str, instance: str, digest: str) -> Placement:
    reason = f"{site}: a raw call, sent there by its caller"
    return Placement(site=site, instance=instance, digest=digest, reason=reason, candidates=())
