"""The end of a run in the books: its hold settled or voided and its record written, once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from fabric.broker.signals import Settle, Ticket, Void
from fabric.catalog import Catalog, RunRecord
from fabric.errors import ChargeExceedsHold, HoldNotOpen
from fabric.ledger import Ledger
from fabric.sql import utc_now
from fabric.sql.offload import Offload

MAX_BATCH = 8
"""Ends written in one transaction; a hold that comes meanwhile waits no longer than that."""
RETRY_S = 0.5

End = Settle | Void

Also = Callable[[], bool]
"""Writes on the database's thread, and returns whether the runs are to be charged."""

logger = logging.getLogger(__name__)


class Conclusion:
    """Writes the ends of runs on the database's thread, and again until they are written.

    Ends that queue up there share a transaction. If the hub is killed before one is written, its
    hold's lease runs out and the project gets all of it back.
    """

    def __init__(self, *, ledger: Ledger, catalog: Catalog, offload: Offload) -> None:
        self._ledger = ledger
        self._catalog = catalog
        self._offload = offload
        self._waiting: deque[End] = deque()
        self._failed: list[End] = []
        self._retry: asyncio.TimerHandle | None = None
        self._closing = False

    def begin(self, end: End) -> None:
        """Queue the writing now: calls to the database's thread that are not urgent and come later
        find it written."""
        self._waiting.append(end)
        # As many calls as ends: when the call for an end is over, that end has been taken.
        self._offload.post(self._write_next, asyncio.get_running_loop())

    async def together(self, ends: Sequence[End], also: Also) -> None:
        """Write ends in one transaction with what ``also`` writes, and return once that is done."""
        while not await self._offload(self._try_together, ends, also):
            if self._closing:
                _give_up(ends)
                return
            await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Wait until all is written; what cannot be written now is given up."""
        self._closing = True
        self._again()
        await self._offload(_nothing)  # It comes after all that was queued.

    def _on_failed(self, failed: Sequence[End]) -> None:
        if self._closing:
            _give_up(failed)
            return
        self._failed += failed
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._again)

    def _again(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        failed, self._failed, self._retry = self._failed, [], None
        for end in failed:
            self.begin(end)

    # ---- on the database's thread ---------------------------------------------------------------

    def _write_next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write the next batch; what could not be written is tried again."""
        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        if not batch or self._try(batch):
            return
        # One of them may spoil it for the others.
        if failed := [end for end in batch if not self._try([end])]:
            loop.call_soon_threadsafe(self._on_failed, failed)

    def write(self, batch: Sequence[End]) -> list[int]:
        """Write ends, all or none, and return what each was charged. Blocks."""
        with self._offload.database.transaction():
            charges_usu = [self._close_hold(end) for end in batch]
            records = [_record(*one) for one in zip(batch, charges_usu, strict=True)]
            self._catalog.record_runs(records)
        return charges_usu

    def _try(self, batch: Sequence[End]) -> bool:
        try:
            self.write(batch)
        except Exception:
            run_ids = [end.run_id for end in batch]
            logger.exception("ends of runs are not written yet", extra={"runs": run_ids})
            return False
        return True

    def _try_together(self, ends: Sequence[End], also: Also) -> bool:
        try:
            with self._offload.database.transaction():
                self.write(ends if also() else [_uncharged(end) for end in ends])
        except Exception:
            run_ids = [end.run_id for end in ends]
            logger.exception("ends of runs are not written yet", extra={"runs": run_ids})
            return False
        return True

    def _close_hold(self, end: End) -> int:
        """Settle or void; return what was charged."""
        outcome = end.outcome
        try:
            if isinstance(end, Settle):
                model = outcome.ticket.model
                self._ledger.settle(end.run_id, outcome.charge_usu, site=end.site, model=model)
                return outcome.charge_usu
            self._ledger.void(end.run_id)
        except (HoldNotOpen, ChargeExceedsHold) as error:
            logger.error("run not charged", extra={"run": end.run_id, "code": error.code})
        return 0


def _nothing() -> None:
    """Do nothing."""


def _give_up(ends: Sequence[End]) -> None:
    logger.error("runs are not charged", extra={"runs": [end.run_id for end in ends]})


def _uncharged(end: End) -> Void:
    return Void(run_id=end.run_id, outcome=replace(end.outcome, charge_usu=0))


def _record(end: End, charge_usu: int) -> RunRecord:
    outcome = end.outcome
    ticket, placement = outcome.ticket, outcome.placement
    return RunRecord(
        id=end.run_id,
        project=ticket.project,
        key_id=ticket.key_id,
        model=ticket.model,
        digest=ticket.digest,
        adapter=ticket.adapter if isinstance(ticket, Ticket) else None,
        state=outcome.state,
        created_at=ticket.created_at,
        site=placement.site if placement else None,
        instance=placement.instance if placement else None,
        attempts=outcome.attempts,
        usage=outcome.usage,
        charge_usu=charge_usu,
        first_token_s=outcome.first_token_s,
        total_s=outcome.total_s,
        placement=placement,
        error_code=outcome.failure_code,
        program=ticket.program,
        finished_at=utc_now(),
    )
