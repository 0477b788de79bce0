"""The broker: carries out what the state decides, and tells it what happens."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import cast

from fabric.auth import Identity, Rulebook, TicketRecord
from fabric.broker.admit import Admission, FindAdapter
from fabric.broker.background import Background
from fabric.broker.conclude import Also, Conclusion, End
from fabric.broker.desk import ArrivalDesk, ProgramDesk
from fabric.broker.lengths import Lengths
from fabric.broker.limits import Standing
from fabric.broker.metering import Metering
from fabric.broker.observe import Observer, Silent
from fabric.broker.programs import ProgramBounds
from fabric.broker.replicas import ReplicaView
from fabric.broker.run import Run
from fabric.broker.select import Context, decide, select
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    AbandonAttempt,
    Admitted,
    AttemptEvent,
    AttemptLost,
    CancelAttempt,
    ClientGone,
    ClientSlow,
    Emit,
    HoldMoved,
    HoldRefused,
    Instruction,
    MoveHold,
    ReplicaJoined,
    ReplicaLeft,
    ReplicaReported,
    SendTask,
    Settle,
    StateEvent,
    Tick,
    Void,
)
from fabric.broker.state import BrokerState
from fabric.broker.tier_desk import TierDesk
from fabric.catalog import Catalog
from fabric.dispatch.protocol import Channel
from fabric.errors import (
    DispatchError,
    Duplicate,
    FabricError,
    InsufficientBalance,
    NoReplica,
    SessionLost,
)
from fabric.ledger import Ledger
from fabric.messages import (
    Event,
    Metered,
    Placed,
    Placement,
    Request,
    RunCompleted,
    RunFailed,
    Task,
    Token,
)
from fabric.sql.offload import Offload

logger = logging.getLogger(__name__)


class Broker:
    """Admits requests, sends each to the best replica, and sees it to its one end.

    All methods are called on the event loop that ``start`` ran on. Per run there is one task that
    reads the replica's events and one call to the database at either end; a token costs one pass
    through the state and no task.

    Args:
        ledger: Holds and charges.
        catalog: Models, sites and run records.
        offload: The database's thread.
        settings: Limits and weights.
        observer: Hears of every run.
        find_adapter: Finds the adapters that requests name; without it there are none.
        rules: Grants and limits; by default it reads them for itself.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        catalog: Catalog,
        offload: Offload,
        settings: BrokerSettings | None = None,
        observer: Observer | None = None,
        find_adapter: FindAdapter | None = None,
        rules: Rulebook | None = None,
    ) -> None:
        self._settings = settings or BrokerSettings()
        self._ledger = ledger
        self._offload = offload
        self._observer: Observer = observer or Silent()
        lengths = Lengths()
        self.rules = rules or Rulebook(offload)
        self._admission = Admission(
            ledger=ledger,
            catalog=catalog,
            offload=offload,
            settings=self._settings,
            rules=self.rules,
            find_adapter=find_adapter,
            lengths=lengths,
        )
        self._conclusion = Conclusion(ledger=ledger, catalog=catalog, offload=offload)
        self._metering = Metering(
            admission=self._admission,
            conclusion=self._conclusion,
            ledger=ledger,
            catalog=catalog,
            offload=offload,
            settings=self._settings,
            observer=self._observer,
        )
        self._state = BrokerState(
            self._settings,
            started_at=time.monotonic(),
            salt_key=secrets.token_bytes(32),
            lengths=lengths,
        )
        self.programs = ProgramDesk(self._state, self._admission)
        self.arrivals = ArrivalDesk(self._feed, self._admission.accounts)
        self.tiers = TierDesk(self._state, self._admission, self.rules)
        self._channels: dict[str, Channel] = {}
        self._admitting: set[str] = set()
        self._runs: dict[str, Run] = {}
        self._deferred: dict[str, End | None] = {}
        self._pumps: dict[tuple[str, int], tuple[asyncio.Task[None], Channel]] = {}
        self._events: deque[StateEvent] = deque()
        self._handling = False
        self._background = Background()
        self._closing = False

    async def start(self) -> None:
        """Release what a killed hub left held, and begin to keep time."""
        await self._metering.start()
        self._background.every(self._settings.tick_s, self._tick)
        self._background.every(self._keep_s, self._keep_holds)

    async def close(self) -> None:
        """Cancel all runs, settle them, and close the channels. Calling it twice is harmless."""
        self._closing = True
        await asyncio.gather(*(run.cancel() for run in list(self._runs.values())))
        await self.conclude(list(self._deferred), lambda: False)
        await self._conclusion.close()
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))
        await self._background.close(pump for pump, _ in self._pumps.values())

    # ---- replicas -------------------------------------------------------------------------------

    def attach(self, channel: Channel) -> str:
        """Take a channel into the pool and return the replica's id.

        It leaves the pool by itself when it closes, and takes nothing new while it drains; one to
        the same instance replaces the one before. The broker closes it when it closes.
        """
        instance = channel.hello.instance
        now = time.monotonic()
        if instance in self._channels:
            self._feed(ReplicaLeft(now=now, instance=instance, lost=True))
        self._channels[instance] = channel
        self._feed(
            ReplicaJoined(
                now=now, hello=channel.hello, streams=channel.streams, joined_at=time.time()
            )
        )
        self._background.spawn(self._watch(instance, channel))
        return instance

    def replicas(self) -> list[ReplicaView]:
        """Return the replicas that are there now."""
        return self._state.fleet.views()

    async def _watch(self, instance: str, channel: Channel) -> None:
        await channel.wait_closed()
        if self._channels.get(instance) is channel:
            del self._channels[instance]
            lost = not channel.draining
            self._feed(ReplicaLeft(now=time.monotonic(), instance=instance, lost=lost))

    # ---- requests -------------------------------------------------------------------------------

    async def submit(
        self,
        identity: Identity,
        request: Request,
        *,
        deferred: bool = False,
        bounds: ProgramBounds | None = None,
    ) -> Run:
        """Admit a request and return its run, which is on its way.

        Args:
            identity: Who asks.
            request: What is asked.
            deferred: Whether its end waits for ``conclude`` before it is written.
            bounds: Of a program, what it may take.

        Raises:
            TooManyRequests: As many requests are in flight as may be.
            RateLimited: The requests or the tokens of a minute are used up.
            RequestOverLimit: It may take more tokens than there are in a minute.
            Duplicate: A request of this id is running.
            PermissionDenied: The key may not query.
            NotGranted: The caller may not use the model, or the sites, so.
            UnknownModel: The model is not in the catalog.
            UnknownSite: A site is not in the catalog.
            ContextExceeded: A token prompt and its output do not fit the context.
            RateMissing: The model has no price where it may run.
            InsufficientBalance: No allocation covers the largest charge.
            NoReplica: None can serve it, and no wait could help.
            Overloaded, TierNotHeld: It would come too late for its deadline or its tier.
        """
        started_at = time.monotonic()
        await self.tiers.heed()
        self._check_open(request)
        if self._is_known(request.id):
            raise Duplicate(kind="run", name=request.id)
        self._admission.enter(request.id, identity)
        self._admitting.add(request.id)
        try:
            scope = "query" if bounds is None else "program:read"
            foresee = partial(self._foresee, project=identity.project)
            ticket = await self._admission.admit(
                identity, request, foresee, scope=scope, bounds=bounds
            )
            self._check_open(request)
        except BaseException as error:
            self._admission.leave(request.id)
            self.tiers.refused(request, error)
            raise
        finally:
            self._admitting.discard(request.id)
        run = self._runs[request.id] = Run(
            request.id,
            model=ticket.name,
            started_at=started_at,
            max_backlog=self._settings.backlog_events,
            leave=lambda: self._feed(ClientGone(now=time.monotonic(), run_id=request.id)),
        )
        if deferred:
            self._deferred[request.id] = None
        self._observer.run_admitted(ticket.name, request)
        self._feed(Admitted(now=time.monotonic(), started_at=started_at, ticket=ticket))
        return run

    async def conclude(self, run_ids: Sequence[str], also: Also) -> None:
        """Write the ends of deferred runs in one transaction with what ``also`` writes.

        Until then their holds stay open; a hub that is killed before has charged nothing.

        Args:
            run_ids: Deferred runs that have ended.
            also: Writes on the database's thread; without its consent all that was held goes back.
        """
        popped = [self._deferred.pop(run_id, None) for run_id in run_ids]
        if ends := [end for end in popped if end is not None]:
            await self._conclusion.together(ends, also)

    async def explain(
        self, identity: Identity, request: Request, *, bounds: ProgramBounds | None = None
    ) -> Placement:
        """Return where the request would go now and why, without holding or sending anything.

        Raises:
            NoReplica: Nowhere; the error says why, by instance.
            FabricError: As ``submit`` does.
        """
        context = await self._admission.prospect(identity, request, bounds)
        now = time.monotonic()
        context = self._state.experience.informed(now, request, context)
        return decide(request, self._state.fleet.snapshots(now), context).outlook()

    def standing(self, identity: Identity) -> list[Standing]:
        """Return what is left of a caller's limits of requests and tokens."""
        return self._admission.standing(identity)

    def _is_known(self, run_id: str) -> bool:
        return run_id in self._runs or run_id in self._admitting or run_id in self._metering

    def _check_open(self, request: Request) -> None:
        if self._closing:
            # Of a request whose admission was under way, what was held goes back.
            self._offload(self._admission.void, request.id)
            raise NoReplica(model=request.model, reasons={"hub": "it is shutting down"})

    def _foresee(self, request: Request, context: Context, *, project: str) -> Placement | None:
        return self._state.foresee(time.monotonic(), request, context, project=project)

    # ---- raw calls ------------------------------------------------------------------------------

    async def redeem(
        self,
        ticket: TicketRecord,
        request: Request,
        *,
        instance: str,
        bounds: ProgramBounds | None = None,
    ) -> None:
        """Admit a request that a user sent to this instance, and hold its largest charge.

        Raises:
            NoReplica: The instance is not in the pool, or cannot serve it.
            Duplicate: There was a run of this id.
            TicketSpent: The ticket's calls would cost more than they may.
            FabricError: As ``submit`` does.
        """
        await self.rules.current()
        if self._closing:
            raise NoReplica(model=request.model, reasons={"hub": "it is shutting down"})
        if self._is_known(request.id):
            raise Duplicate(kind="run", name=request.id)

        def foresee(request: Request, context: Context) -> Placement:
            now = time.monotonic()
            here = [one for one in self._state.fleet.snapshots(now) if one.instance == instance]
            return select(request, here, self._state.experience.informed(now, request, context))

        await self._metering.redeem(
            ticket, request, instance=instance, foresee=foresee, bounds=bounds
        )

    async def settle(self, instance: str, metered: Metered) -> None:
        """Charge what an instance says a redeemed request consumed, once.

        Raises:
            FabricError: It could not be written, and should be said again.
        """
        await self._metering.settle(instance, metered)

    # ---- the state's hands ----------------------------------------------------------------------

    def _feed(self, event: StateEvent) -> None:
        """Give the state an event and carry out its instructions, one event at a time."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                for instruction in self._state.handle(self._events.popleft()):
                    self._carry_out(instruction)
        finally:
            self._handling = False

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Emit():
                self._emit(instruction)
            case SendTask():
                self._send(instruction)
            case CancelAttempt(run_id=run_id, attempt=attempt):
                if (pump := self._pumps.get((run_id, attempt))) is not None:
                    self._background.spawn(_cancel(pump[1], run_id, attempt))
            case AbandonAttempt(run_id=run_id, attempt=attempt):
                if (pump := self._pumps.get((run_id, attempt))) is not None:
                    pump[0].cancel()
            case MoveHold():
                self._background.spawn(self._move_hold(instruction))
            case Settle() | Void():
                self._conclude(instruction)

    def _emit(self, instruction: Emit) -> None:
        run, event = self._runs[instruction.run_id], instruction.event
        run.put(event)
        if isinstance(event, Token):
            self._observer.token(run.model)
            if not run.has_tokens:
                run.has_tokens = True
                self._observer.first_token(run.model, time.monotonic() - run.started_at)
        elif isinstance(event, Placed):
            self._observer.run_placed(run.model, event.placement, event.attempt)
        elif isinstance(event, RunCompleted | RunFailed):
            del self._runs[instruction.run_id]

    def _conclude(self, instruction: Settle | Void) -> None:
        """Queue the settlement before the client hears of the end, so that its next request finds
        the balance settled; the client does not wait for it."""
        if instruction.run_id in self._deferred:
            self._deferred[instruction.run_id] = instruction
        else:
            self._conclusion.begin(instruction)
        outcome = instruction.outcome
        self._admission.leave(instruction.run_id, outcome.usage)
        self.tiers.ended(outcome)
        self._observer.run_ended(
            outcome.ticket.name,
            outcome.state,
            outcome.usage,
            e2e_s=outcome.total_s,
            charge_usu=outcome.charge_usu,
            failure_code=outcome.failure_code,
        )

    def _send(self, instruction: SendTask) -> None:
        task, channel = instruction.task, self._channels.get(instruction.instance)
        if channel is None:
            error = SessionLost(instance=instruction.instance, reason="its session has ended")
            self._feed(_lost(task, error))
            return
        key = (task.id, task.attempt)
        pump = asyncio.create_task(self._pump(task, channel), name=f"{task.id}/{task.attempt}")
        self._pumps[key] = pump, channel
        pump.add_done_callback(lambda _: self._pumps.pop(key))

    async def _pump(self, task: Task, channel: Channel) -> None:
        """Pass on what the replica says of one attempt, no faster than the client takes it."""
        run = self._runs[task.id]
        error: DispatchError
        try:
            events = cast(AsyncGenerator[Event, None], channel.run(task))
            async with aclosing(events):
                async for event in events:
                    self._feed(
                        AttemptEvent(
                            now=time.monotonic(),
                            run_id=task.id,
                            attempt=task.attempt,
                            event=event,
                        )
                    )
                    if run.full:
                        self._feed(ClientSlow(now=time.monotonic(), run_id=task.id))
                        await run.room()
            error = SessionLost(instance=channel.hello.instance, reason="it ended without a result")
        except DispatchError as lost:
            error = lost
        except Exception as fault:
            logger.exception("channel failed", extra={"run": task.id})
            reason = f"its channel failed ({type(fault).__name__})"
            error = SessionLost(instance=channel.hello.instance, reason=reason)
        if task.id in self._state.runs:  # Of an attempt that has ended it takes no notice.
            self._feed(_lost(task, error))

    async def _move_hold(self, move: MoveHold) -> None:
        try:
            await self._offload.urgent(
                self._ledger.move_hold, move.run_id, move.allocation, move.amount_usu
            )
        except Exception as error:
            if not isinstance(error, InsufficientBalance):
                logger.exception("hold not moved", extra={"run": move.run_id})
            self._feed(HoldRefused(now=time.monotonic(), run_id=move.run_id))
        else:
            self._feed(HoldMoved(now=time.monotonic(), run_id=move.run_id))

    # ---- time -----------------------------------------------------------------------------------

    @property
    def _keep_s(self) -> float:
        return min(self._settings.sweep_s, self._settings.lease_s / 3)

    async def _tick(self) -> None:
        now = time.monotonic()
        for instance, channel in self._channels.items():
            self._feed(
                ReplicaReported(
                    now=now, instance=instance, load=channel.load, draining=channel.draining
                )
            )
        self._feed(Tick(now=now))

    async def _keep_holds(self) -> None:
        """Renew the leases of what runs here; release those that nobody renewed."""
        if live := [*{*self._runs, *self._deferred}, *self._metering.held_for(self._channels)]:
            renewed = await self._offload(self._ledger.renew, live, self._settings.lease_s)
            for run_id in self._runs.keys() & (set(live) - set(renewed)):
                logger.error("the hold of a live run is not open", extra={"run": run_id})
        await self._metering.release()


def _lost(task: Task, error: DispatchError) -> AttemptLost:
    return AttemptLost(now=time.monotonic(), run_id=task.id, attempt=task.attempt, error=error)


async def _cancel(channel: Channel, run_id: str, attempt: int) -> None:
    try:
        await channel.cancel(run_id, attempt)
    except FabricError as error:
        # The session is gone and the attempt with it, which its pump reports.
        logger.info("attempt not cancelled", extra={"run": run_id, "code": error.code})
