"""The session channel: the hub's side of the protocol, on any connection."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

from fabric.errors import DispatchError, ProtocolViolation, SessionLost
from fabric.messages import (
    Accepted,
    Cancel,
    Credit,
    Drain,
    Embedding,
    Event,
    Failed,
    Finished,
    FromHub,
    FromInstance,
    Goodbye,
    Heartbeat,
    Hello,
    InstanceState,
    Load,
    Metered,
    PromptScored,
    Redeem,
    Redeemed,
    Saves,
    Settled,
    Task,
    Token,
    Usage,
    Welcome,
    new_id,
    parse_from_instance,
)
from fabric.messages.session import PROTOCOL

HELLO_TIMEOUT_S = 10.0
MISSED_HEARTBEATS = 3
TOKEN_FRAME_CHARS = 64 * 2**10
"""The longest token frame that is read: with the window it bounds what a task may hold here."""

logger = logging.getLogger(__name__)


class ConnectionLost(Exception):
    """A ``Connection`` has ended; the message says how."""


class Connection(Protocol):
    """A message pipe to an instance: a WebSocket of the hub's, or a client's.

    Messages are text of one or several frames, a frame a line.
    """

    async def send(self, text: str) -> None:
        """Send one message.

        Raises:
            ConnectionLost: The connection has ended.
        """

    async def receive(self) -> str:
        """Return the next message.

        Raises:
            ConnectionLost: The connection has ended.
        """

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection; calling it twice is harmless."""


class Till(Protocol):
    """Where an instance has tickets redeemed and says what their tasks consumed."""

    async def redeem(self, frame: Redeem) -> Redeemed:
        """Admit a task that a ticket pays for, or return why not."""

    async def settle(self, frame: Metered) -> Settled | None:
        """Close the books on a task; ``None`` if that must be asked again."""


class _Inbox:
    """The events of one running task that its consumer has not taken, and the grammar they keep."""

    __slots__ = ("accepted", "allowance", "arrived", "error", "events", "scored", "started")

    def __init__(self, window: int) -> None:
        self.allowance = window
        self.events: deque[Event] = deque()
        self.arrived = asyncio.Event()
        self.error: DispatchError | None = None
        self.accepted = False
        self.scored = False
        self.started = False

    def put(self, event: Event) -> str | None:
        """Take an event, or return why it does not belong here."""
        if isinstance(event, Token | Saves):
            if not self.accepted:
                return "a token before the task was accepted"
            if self.allowance == 0:
                return "more tokens than it has credit for"
            self.allowance -= 1
            self.started = True
        elif isinstance(event, Accepted):
            if self.accepted:
                return "a task accepted twice"
            self.accepted = True
        elif isinstance(event, PromptScored):
            if not self.accepted or self.started or self.scored:
                return "prompt scores out of order"
            self.scored = True
        elif isinstance(event, Embedding):
            if not self.accepted or self.started:
                return "an embedding out of order"
            self.started = True
        elif isinstance(event, Finished) and not self.accepted:
            return "a task finished before it was accepted"
        self.events.append(event)
        self.arrived.set()
        return None

    def end(self, error: DispatchError) -> None:
        self.error = error
        self.arrived.set()


class SessionChannel:
    """A ``Channel`` over one connection to an instance.

    ``open`` reads what the instance says of itself; ``welcome`` accepts it and starts the session.
    In between the caller may look at ``hello`` and refuse it with ``close(code, reason)``, or set
    the ``till`` for raw calls; a channel without one takes none.
    """

    streams = True

    def __init__(
        self, connection: Connection, hello: Hello, *, heartbeat_s: float, session_id: str
    ) -> None:
        self.hello = hello
        self.load: Load = hello.load
        self.draining = False
        self.session_id = session_id
        self.till: Till | None = None
        self.num_stray_events = 0
        """Events of tasks that had ended here: late, or sent twice."""
        self._connection = connection
        self._heartbeat_s = heartbeat_s
        self._inboxes: dict[tuple[str, int], _Inbox] = {}
        self._outgoing: deque[str] = deque()
        self._has_outgoing = asyncio.Event()
        self._heard = True
        self._reason: str | None = None
        self._ended = asyncio.Event()
        self._close_code = 1000
        self._serving: asyncio.Task[None] | None = None
        self._tolls: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, connection: Connection, *, heartbeat_s: float = 2.0, session_id: str | None = None
    ) -> SessionChannel:
        """Return a channel to the instance at the other end, which has said hello.

        Args:
            connection: A connection on which nothing has been read; closed if this raises.
            heartbeat_s: How often the instance shall send heartbeats; three missed ones end it.
            session_id: A name for the session; a fresh one when ``None``.

        Raises:
            SessionLost: The instance went away, or said nothing for ten seconds.
            ProtocolViolation: It said something else, or speaks another protocol version.
        """
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = parse_from_instance(await connection.receive())
            if not isinstance(hello, Hello):
                raise ProtocolViolation(
                    peer="The instance", reason=f"a {hello.type} before its hello"
                )
            if hello.protocol != PROTOCOL:
                raise ProtocolViolation(
                    peer=f"The instance {hello.instance!r}",
                    reason=f"it speaks protocol {hello.protocol}, the hub speaks {PROTOCOL}",
                )
        except (ConnectionLost, TimeoutError) as error:
            await connection.close(1008, "no hello")
            reason = str(error) or "it did not say hello in time"
            raise SessionLost(instance="(unknown)", reason=reason) from error
        except ProtocolViolation as error:
            await connection.close(1002, _close_reason(error.message))
            raise
        return cls(
            connection,
            hello,
            heartbeat_s=heartbeat_s,
            session_id=session_id or new_id("session"),
        )

    async def welcome(self) -> None:
        """Accept the instance and start the session."""
        self._post(Welcome(session=self.session_id, heartbeat_s=self._heartbeat_s))
        self._serving = asyncio.create_task(self._serve(), name=self.session_id)

    async def run(self, task: Task) -> AsyncIterator[Event]:
        """Send a task and yield its events; see ``Channel.run``."""
        if self._reason is not None:
            raise SessionLost(instance=self.hello.instance, reason=self._reason)
        key = (task.id, task.attempt)
        if key in self._inboxes:
            raise ProtocolViolation(peer="The hub", reason=f"{key} is sent twice at once")
        inbox = self._inboxes[key] = _Inbox(task.window)
        self._post(task)
        credit = 0
        try:
            while True:
                while not inbox.events:
                    if inbox.error is not None:
                        raise inbox.error
                    inbox.arrived.clear()
                    await inbox.arrived.wait()
                event = inbox.events.popleft()
                if isinstance(event, Token | Saves):
                    credit += 1
                    if credit * 2 >= task.window:
                        inbox.allowance += credit
                        self._post(Credit(task_id=key[0], attempt=key[1], num_events=credit))
                        credit = 0
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            # Still there if the instance has not ended it: the caller wants no more.
            if self._inboxes.get(key) is inbox:
                del self._inboxes[key]
                self._post(Cancel(task_id=key[0], attempt=key[1]))

    async def cancel(self, task_id: str, attempt: int) -> None:
        """Ask the instance to end a task; its events go on to the last."""
        self._post(Cancel(task_id=task_id, attempt=attempt))

    async def wait_closed(self) -> str:
        """Return the reason once the session has ended."""
        await self._ended.wait()
        return self._reason or ""

    async def drain(self, reason: str) -> None:
        """Ask the instance to finish its tasks and leave."""
        self._post(Drain(reason=reason))

    async def close(self, reason: str = "closed by the hub", *, code: int = 1000) -> None:
        """End the session with a WebSocket close code; running tasks end with ``SessionLost``."""
        self._end(reason, code)
        if self._serving is None:
            await self._connection.close(self._close_code, _close_reason(reason))
        else:
            await asyncio.wait([self._serving])

    # ---- the session's jobs ------------------------------------------------------------------

    async def _serve(self) -> None:
        parts = (self._read(), self._write(), self._watch(), self._ended.wait())
        jobs = [asyncio.ensure_future(part) for part in parts]
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in jobs:
                job.cancel()
            for outcome in await asyncio.gather(*jobs, return_exceptions=True):
                if isinstance(outcome, Exception):
                    logger.error("session failed", exc_info=outcome)
            self._end("the session failed in the hub", 1011)
            await self._connection.close(self._close_code, _close_reason(self._reason or ""))

    async def _read(self) -> None:
        try:
            while self._reason is None:
                message = await self._connection.receive()
                self._heard = True
                for line in message.split("\n"):
                    frame = parse_from_instance(line)
                    if isinstance(frame, Token) and len(line) > TOKEN_FRAME_CHARS:
                        raise self._violation("a token frame that is too long")
                    self._handle(frame)
        except ConnectionLost as lost:
            self._end(str(lost))
        except ProtocolViolation as error:
            logger.warning("session closed", extra={"instance": self.hello.instance})
            self._end(error.message, 1002)

    def _handle(self, frame: FromInstance) -> None:
        match frame:
            case Heartbeat(state=state, load=load):
                self.load = load
                self.draining = self.draining or state is InstanceState.DRAINING
            case Goodbye(reason=reason):
                self._end(reason)
            case Hello():
                raise self._violation("a second hello")
            case Redeem() | Metered():
                self._charge(frame)
            case _:
                self._route(frame)

    def _charge(self, frame: Redeem | Metered) -> None:
        if self.till is None:
            raise self._violation(f"a {frame.type} where nobody is charged")
        till = self.till
        job = self._redeem(till, frame) if isinstance(frame, Redeem) else self._settle(till, frame)
        # Not a job of the session: what it has begun in the books it also ends.
        toll = asyncio.create_task(job)
        self._tolls.add(toll)
        toll.add_done_callback(self._tolls.discard)

    async def _redeem(self, till: Till, frame: Redeem) -> None:
        redeemed = await till.redeem(frame)
        if self._reason is None:
            self._post(redeemed)
        elif redeemed.failure is None:
            await till.settle(_unheard(frame))

    async def _settle(self, till: Till, frame: Metered) -> None:
        if (settled := await till.settle(frame)) is not None:
            self._post(settled)

    def _route(self, event: Event) -> None:
        key = (event.task_id, event.attempt)
        inbox = self._inboxes.get(key)
        if inbox is None:
            self.num_stray_events += 1
        elif (reason := inbox.put(event)) is not None:
            inbox.end(self._violation(reason))
            raise self._violation(reason)
        elif isinstance(event, Finished | Failed):
            del self._inboxes[key]

    async def _write(self) -> None:
        try:
            while True:
                await self._has_outgoing.wait()
                self._has_outgoing.clear()
                while self._outgoing:
                    await self._connection.send(self._outgoing.popleft())
        except ConnectionLost:
            # What the instance said before it went is still to be read, and ends the session.
            await self._ended.wait()

    async def _watch(self) -> None:
        """End the session after three intervals in which nothing was heard.

        Intervals are counted rather than timed, so that a hub that itself stood still does not take
        its own pause for the instance's silence.
        """
        missed = 0
        while missed < MISSED_HEARTBEATS:
            await asyncio.sleep(self._heartbeat_s)
            missed = 0 if self._heard else missed + 1
            self._heard = False
        self._end(f"nothing was heard of it for {missed * self._heartbeat_s:g} s", 1001)

    def _post(self, frame: FromHub) -> None:
        if self._reason is None:
            self._outgoing.append(frame.model_dump_json())
            self._has_outgoing.set()

    def _end(self, reason: str, code: int = 1000) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        self._close_code = code
        self._ended.set()
        for inbox in self._inboxes.values():
            if inbox.error is None:
                inbox.end(SessionLost(instance=self.hello.instance, reason=reason))
        self._inboxes.clear()

    def _violation(self, reason: str) -> ProtocolViolation:
        return ProtocolViolation(peer=f"The instance {self.hello.instance!r}", reason=reason)


def _unheard(frame: Redeem) -> Metered:
    """Return the end of a task whose instance went away before it was told that it may run."""
    return Metered(
        task_id=frame.task_id,
        attempt=frame.attempt,
        usage=Usage(),
        failure_code=SessionLost.code,
    )


def _close_reason(text: str) -> str:
    """Return ``text`` cut to what a WebSocket close frame can carry."""
    return text.encode()[:120].decode(errors="ignore")
