"""Serves one session: the instance's side of the protocol, on any WebSocket.

The engine works on a thread of its own and its sinks must not block, so events cross to the event
loop in batches: one wake-up takes whatever has gathered, and one WebSocket message carries it, a
frame a line. Token events beyond a task's credit wait in that task's outbox; other tasks go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Literal

from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed, ConnectionClosedError

from fabric.engine.interface import Engine, EventSink
from fabric.errors import (
    DigestMismatch,
    EngineStopped,
    FabricError,
    PayloadError,
    RequestCancelled,
    RequestInvalid,
    TicketMissing,
)
from fabric.errors import ProtocolViolation as Violation
from fabric.instance.depot import Depot, constants_elsewhere, out_of_reach
from fabric.instance.meter import Meter
from fabric.messages import (
    Cancel,
    Credit,
    Drain,
    Event,
    Failed,
    Failure,
    Finished,
    FromHub,
    Goodbye,
    Heartbeat,
    Hello,
    InstanceState,
    Metered,
    Redeem,
    Redeemed,
    Saves,
    Settled,
    Task,
    Token,
    Welcome,
    parse_from_hub,
)
from fabric.messages.session import MAX_FRAME_BYTES

WELCOME_TIMEOUT_S = 10.0
MESSAGE_CHARS = 64 * 2**10
"""Frames are joined to one message up to this size; a longer frame travels alone."""

Peer = Literal["hub", "client", "guest"]

logger = logging.getLogger(__name__)


async def serve_session(
    connection: Connection,
    engine: Engine,
    hello: Hello,
    drain: asyncio.Event,
    *,
    peer: Peer = "hub",
    meter: Meter | None = None,
    depot: Depot | None = None,
) -> None:
    """Serve the peer of ``connection`` until it goes away or the instance has drained.

    The peer's tasks are cancelled when the connection ends. A peer that breaks the protocol is
    closed with code 1002 and the reason; one that does not answer ``Hello``, with 1008.

    Args:
        connection: A WebSocket, dialled or accepted.
        engine: Runs the tasks; several sessions share it.
        hello: What the instance says of itself; ``load`` is filled in.
        drain: Once set (by the process, or here by a ``Drain`` frame): running tasks finish, new
            ones are refused, and the session ends with ``Goodbye``.
        peer: Who is at the other end. The session with the ``hub`` is where the meter asks and
            reports; a ``client`` on the direct route speaks for the hub; a ``guest`` may only send
            tasks with tickets, and cancel its own.
        meter: Shared by the sessions of an instance; without one no ticket can be redeemed.
        depot: Shared by them too: the way to the hub's artifacts, if there is one.
    """
    meter = meter or Meter(hello.instance)
    session = _Session(connection, engine, hello, drain, peer, meter, depot)
    try:
        await session.run()
    except ConnectionClosed:
        pass
    except TimeoutError:
        await _close(connection, 1008, "no answer to hello")
    except Violation as error:
        logger.warning("session closed", extra={"instance": hello.instance, "code": error.code})
        await _close(connection, 1002, error.message.encode()[:120].decode(errors="ignore"))


async def _close(connection: Connection, code: int, reason: str) -> None:
    with suppress(AttributeError):  # see _Session._send
        await connection.close(code, reason)


class _Outbox:
    """The events of one task that have not been sent, and how many more may be."""

    __slots__ = (
        *("credit", "ended", "leaving", "muted", "pending", "preparing", "submitted", "task"),
    )

    def __init__(self, task: Task) -> None:
        self.task = task
        self.credit = task.window
        self.pending: deque[Event] = deque()
        self.muted = False
        """Cancelled: no more tokens."""
        self.ended = False
        """Its last event was sent."""
        self.submitted = False
        """The engine has it."""
        self.preparing: asyncio.Task[None] | None = None
        """It is redeemed, or its constants are fetched."""
        self.leaving: dict[int, asyncio.Task[None]] = {}
        """What takes results to the hub, by the event that waits for it."""

    def sendable(self) -> Iterator[Event]:
        """Yield the pending events in order, until a token has no credit, or a result is not yet
        at the hub."""
        while self.pending and id(self.pending[0]) not in self.leaving:
            if isinstance(self.pending[0], Token | Saves):
                if self.credit == 0:
                    return
                self.credit -= 1
            yield self.pending.popleft()


class _Session:
    def __init__(
        self,
        connection: Connection,
        engine: Engine,
        hello: Hello,
        drain: asyncio.Event,
        peer: Peer,
        meter: Meter,
        depot: Depot | None,
    ) -> None:
        self._depot = depot
        self._connection = connection
        self._engine = engine
        self._hello = hello
        self._drain = drain
        self._peer = peer
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._outboxes: dict[tuple[str, int], _Outbox] = {}
        self._arrived: deque[tuple[_Outbox, Event]] = deque()
        self._woken = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._lines: deque[str] = deque()
        self._leaving = False

    async def run(self) -> None:
        hello = self._hello.model_copy(update={"load": self._engine.load()})
        await self._send(hello.model_dump_json())
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            welcome, *frames = await self._receive()
        if not isinstance(welcome, Welcome):
            raise Violation(peer="The hub", reason="its first frame is not a welcome")
        parts = (self._read(frames), self._write(), self._pulse(welcome.heartbeat_s))
        jobs = [asyncio.create_task(part) for part in parts]
        post = self._post  # one object, by which the meter knows this session again
        if self._peer == "hub":
            self._meter.connect(post)
        try:
            # The reader ends with the connection; the others do not by themselves.
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._woken = True  # from here on the engine's thread leaves the loop alone
            self._meter.disconnect(post)
            for outbox in list(self._outboxes.values()):
                self._stop(outbox)
                self._forget(outbox)
            for job in jobs:
                job.cancel()
            ended = await asyncio.gather(*jobs, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    # ---- from the peer -----------------------------------------------------------------------

    async def _receive(self) -> list[FromHub]:
        message = await self._connection.recv()
        if not isinstance(message, str):
            raise Violation(peer="The hub", reason="a binary message")
        return [parse_from_hub(line) for line in message.split("\n")]

    async def _read(self, frames: list[FromHub]) -> None:
        while True:
            for frame in frames:
                self._handle(frame)
            frames = await self._receive()

    def _handle(self, frame: FromHub) -> None:
        match frame:
            case Task():
                self._submit(frame)
            case Cancel(task_id=task_id, attempt=attempt):
                outbox = self._outboxes.get((task_id, attempt))
                if outbox is not None:
                    outbox.muted = True
                    self._forget(outbox)
                    outbox.pending = deque(
                        e for e in outbox.pending if not isinstance(e, Token | Saves)
                    )
                    self._flush(outbox)
                    self._stop(outbox)
                elif self._peer != "guest":
                    # A task of another session: a Parsl worker cancels what another one runs.
                    self._engine.cancel(task_id, attempt)
            case Credit(task_id=task_id, attempt=attempt, num_events=num_events):
                outbox = self._outboxes.get((task_id, attempt))
                if outbox is not None:
                    outbox.credit += num_events
                    self._flush(outbox)
            case Redeemed() | Settled() if self._peer == "hub":
                self._meter.take(frame)
            case Drain() if self._peer != "guest":
                self._drain.set()
            case Drain() | Redeemed() | Settled():
                raise Violation(peer=f"A {self._peer}", reason=f"a {frame.type}, which it may not")
            case Welcome():
                raise Violation(peer="The hub", reason="a second welcome")

    def _submit(self, task: Task) -> None:
        key = (task.id, task.attempt)
        if key in self._outboxes:
            return  # sent twice; it runs once
        outbox = self._outboxes[key] = _Outbox(task)
        self._idle.clear()
        if self._drain.is_set():
            self._refuse(outbox, EngineStopped(reason="it is draining"))
        elif task.digest != self._hello.digest:
            self._refuse(
                outbox,
                DigestMismatch(
                    name=self._hello.model, expected=task.digest, actual=self._hello.digest
                ),
            )
        elif task.request.mode not in self._hello.limits.modes:
            served = " and ".join(self._hello.limits.modes)
            reason = f"this instance of {self._hello.model} serves the mode {served}"
            self._refuse(
                outbox, RequestInvalid(param="mode", value=task.request.mode, reason=reason)
            )
        elif (far := constants_elsewhere(task)) is not None and self._depot is None:
            self._refuse(outbox, out_of_reach(far))
        elif task.ticket is None and self._peer != "guest":
            sink = partial(self._on_event, outbox)
            if far is None:
                self._run(outbox, task, sink)
            else:
                outbox.preparing = asyncio.create_task(self._fill(outbox, task, sink))
        elif (error := _check_raw(task)) is not None:
            self._refuse(outbox, error)
        else:
            outbox.preparing = asyncio.create_task(self._redeem(outbox))

    def _run(self, outbox: _Outbox, task: Task, sink: EventSink) -> None:
        self._engine.submit(task, sink)
        outbox.submitted = True

    async def _fill(self, outbox: _Outbox, task: Task, sink: EventSink) -> None:
        """Run a task once its program has its constants."""
        failure: FabricError = RequestCancelled()
        try:
            if self._depot is not None:
                task = await self._depot.fill(task)
            self._run(outbox, task, sink)
        except FabricError as error:
            failure = error
        finally:
            if not outbox.submitted:
                sink(Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(failure)))

    async def _redeem(self, outbox: _Outbox) -> None:
        """Run a raw call once the hub has admitted it."""
        task = outbox.task
        try:
            await self._meter.redeem(task)
        except FabricError as error:
            self._refuse(outbox, error)
            return
        task = task.model_copy(
            update={"ticket": None, "deadline_s": min(task.deadline_s, task.request.deadline_s)}
        )
        sink = self._meter.metered(task, partial(self._on_event, outbox))
        await self._fill(outbox, task, sink)

    def _stop(self, outbox: _Outbox) -> None:
        """End a task wherever it is; nothing happens to one that has ended."""
        if outbox.submitted:
            self._engine.cancel(outbox.task.id, outbox.task.attempt)
        elif outbox.preparing is not None and outbox.preparing.cancel():
            self._refuse(outbox, RequestCancelled())

    def _refuse(self, outbox: _Outbox, error: FabricError) -> None:
        task = outbox.task
        self._forget(outbox)
        outbox.pending.clear()
        outbox.pending.append(
            Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(error))
        )
        self._flush(outbox)

    # ---- to the peer -------------------------------------------------------------------------

    def _on_event(self, outbox: _Outbox, event: Event) -> None:
        """Take an event on the engine's thread."""
        self._arrived.append((outbox, event))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def _collect(self) -> None:
        # Lowered before looking, so that an event that arrives meanwhile wakes the loop again.
        self._woken = False
        while self._arrived:
            outbox, event = self._arrived.popleft()
            if isinstance(event, Failed) and event.failure.code == EngineStopped.code:
                # An engine nobody stopped has failed: leave, so that another one is started.
                self._drain.set()
            if not (outbox.ended or (outbox.muted and isinstance(event, Token | Saves))):
                outbox.pending.append(event)
                if isinstance(event, Saves) and self._depot is not None and self._depot.has(event):
                    leaving = self._leave(self._depot, outbox, event)
                    outbox.leaving[id(event)] = asyncio.create_task(leaving)
                self._flush(outbox)
            elif isinstance(event, Saves) and self._depot is not None:
                self._depot.drop(event)

    async def _leave(self, depot: Depot, outbox: _Outbox, saves: Saves) -> None:
        """Take a result to the hub; its event goes on once it is there."""
        try:
            await depot.leave(saves)
        except FabricError as error:
            del outbox.leaving[id(saves)]
            self._stop(outbox)
            self._refuse(outbox, error)
        else:
            del outbox.leaving[id(saves)]
            self._flush(outbox)

    def _forget(self, outbox: _Outbox) -> None:
        """Stop taking results to the hub that nobody will hear of."""
        for leaving in outbox.leaving.values():
            leaving.cancel()
        outbox.leaving.clear()
        for event in outbox.pending:
            if isinstance(event, Saves) and self._depot is not None:
                self._depot.drop(event)

    def _flush(self, outbox: _Outbox) -> None:
        for event in outbox.sendable():
            line = event.model_dump_json()
            if len(line) > MAX_FRAME_BYTES // 4 and len(line.encode()) > MAX_FRAME_BYTES:
                self._stop(outbox)
                self._refuse(outbox, PayloadError("The answer does not fit one frame; ask less."))
                return
            self._lines.append(line)
            if isinstance(event, Finished | Failed):
                outbox.ended = True
                del self._outboxes[outbox.task.id, outbox.task.attempt]
        if not self._outboxes:
            self._idle.set()
        self._wake.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._collect()
                while self._lines:
                    await self._send(self._next_message())
                    self._collect()
                if self._leaving:
                    await _close(self._connection, 1000, "drained")
        except ConnectionClosed:
            # What the peer sent before it left is still to be read, and ends the session.
            await self._loop.create_future()

    async def _send(self, message: str) -> None:
        try:
            await self._connection.send(message)
        except AttributeError as error:
            # asyncio's transports (3.11) raise it when they are closed a second time after their
            # peer left while data was unsent.
            raise ConnectionClosedError(None, None) from error

    def _next_message(self) -> str:
        lines = [self._lines.popleft()]
        num_chars = len(lines[0])
        while self._lines and num_chars + len(self._lines[0]) < MESSAGE_CHARS:
            lines.append(self._lines.popleft())
            num_chars += len(lines[-1]) + 1
        return "\n".join(lines)

    async def _pulse(self, heartbeat_s: float) -> None:
        """Send heartbeats; once draining and idle, say goodbye."""
        while not self._drain.is_set():
            self._beat(InstanceState.READY)
            # Not wait_for, which (in 3.11) swallows a cancellation that comes with the result: the
            # session would never end.
            with suppress(TimeoutError):
                async with asyncio.timeout(heartbeat_s):
                    await self._drain.wait()
        while not self._is_done():
            self._beat(InstanceState.DRAINING)
            with suppress(TimeoutError):
                async with asyncio.timeout(heartbeat_s):
                    await self._wait_done()
        self._beat(InstanceState.DRAINING)
        self._lines.append(Goodbye(reason="drained").model_dump_json())
        self._leaving = True
        self._wake.set()
        await self._loop.create_future()  # the writer closes the connection, and the reader ends

    def _is_done(self) -> bool:
        """Say whether nothing is left to be said: on the hub's session also of raw calls."""
        return not self._outboxes and (self._peer != "hub" or self._meter.idle.is_set())

    async def _wait_done(self) -> None:
        await self._idle.wait()
        if self._peer == "hub":
            await self._meter.idle.wait()

    def _post(self, frame: Redeem | Metered) -> None:
        self._lines.append(frame.model_dump_json())
        self._wake.set()

    def _beat(self, state: InstanceState) -> None:
        if self._peer == "hub":
            self._meter.remind()
        self._lines.append(Heartbeat(state=state, load=self._engine.load()).model_dump_json())
        self._wake.set()


def _check_raw(task: Task) -> FabricError | None:
    """Return why a task cannot be a raw call: it is one whole request, and it is paid for."""
    if task.ticket is None:
        return TicketMissing()
    if task.id != task.request.id:
        return RequestInvalid(param="id", value=task.id, reason="it is its request's")
    if task.attempt != 1 or task.prefix:
        return RequestInvalid(param="attempt", value=task.attempt, reason="a raw call has only one")
    if task.request.adapter is not None:
        reason = "raw calls take no adapters; ask the hub"
        return RequestInvalid(param="adapter", value=task.request.adapter, reason=reason)
    return None
