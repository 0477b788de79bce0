"""Channels over workers that relay: batches of tasks go out, all of their events come back at once.

A relay runs a function beside the instance and returns what it returned. Parsl and Globus Compute
are such relays. Both acknowledge a task before it runs, so silence alone tells nothing: the channel
asks the instance, through a worker that is free, and decides itself what is lost.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fabric.dispatch.batch import Entry, Waiting
from fabric.errors import (
    DeadlineExceeded,
    EngineStopped,
    FabricError,
    PayloadTooLarge,
    ProtocolViolation,
    RequestCancelled,
    SessionLost,
)
from fabric.messages import (
    Cancel,
    Drain,
    Event,
    Failed,
    Failure,
    Finished,
    Heartbeat,
    Hello,
    InstanceState,
    Load,
    Task,
)

MISSED_POLLS = 3
LAST_WORDS_S = 2.0
"""Answers may still arrive so long after the instance was given up."""
OVERDUE = "it did not answer by the deadline"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayFigures:
    """How a relay wants to be used; times in seconds.

    Args:
        max_batches: Batches under way at once: fewer than there are workers, so that a question
            or a cancellation always finds one free.
        num_spare: Batches more, if their tasks are shorter than all that are under way.
        max_tasks: Tasks of one batch; fewer for an instance of few rows.
        max_bytes: Tasks of one batch, as JSON.
        max_answer_bytes: Expected events of one batch, as JSON.
        poll_s: How often the instance is asked for its load while it has tasks.
        idle_poll_s: And while it has none.
        poll_timeout_s: How long one answer may take; three misses in a row end the channel.
        delivery_s: A batch is lost that is older than the instance's idleness, once that has
            lasted so long; ``None`` where the relay itself tells of every loss.
        grace_s: How long after a task's deadline its answer is still waited for.
    """

    max_batches: int
    num_spare: int = 0
    max_tasks: int = 1
    max_bytes: int = 4 * 2**20
    max_answer_bytes: int = 4 * 2**20
    poll_s: float = 2.0
    idle_poll_s: float = 2.0
    poll_timeout_s: float = 20.0
    delivery_s: float | None = None
    grace_s: float = 10.0


class Relay(Protocol):
    """Runs things beside one instance."""

    @property
    def figures(self) -> RelayFigures:
        """How it wants to be used."""

    async def describe(self) -> tuple[Hello, Heartbeat]:
        """Return what the instance says of itself now.

        Raises:
            ConnectionError: It cannot be reached, or no worker could be.
            FabricError: The same, known more exactly.
        """

    async def run(self, tasks: Sequence[Task]) -> list[list[Event]]:
        """Run tasks at once and return the events of each.

        Tasks that were open when the instance went end with ``Failed(session_lost)``. Cancelling
        the call leaves the tasks as they are.

        Raises:
            ConnectionError: Nothing is known of the tasks.
            FabricError: The same, known more exactly; ``PayloadTooLarge`` if their events do not
                fit the way back.
            ProtocolViolation: What came back are not events.
        """

    def send(self, frames: Sequence[Cancel | Drain]) -> None:
        """Send the instance frames, without waiting; nobody is told whether they arrive."""


class _Sent(NamedTuple):
    at: float
    length_class: int


class RelayChannel:
    """A ``Channel`` over a relay.

    A task is sent at once while fewer than ``max_batches`` are under way; otherwise it waits, and
    goes with others of about its expected length, because a batch ends when its last task does.
    Long ones never take the spare batches, so short ones get through beside them.
    """

    streams = False

    def __init__(self, relay: Relay, hello: Hello, heartbeat: Heartbeat) -> None:
        self.hello = hello
        self.load: Load = heartbeat.load
        self.draining = heartbeat.state is InstanceState.DRAINING
        self.num_stray_answers = 0
        """Answers to tasks that had ended here: late, or given twice."""
        self._relay = relay
        self._figures = relay.figures
        self._loop = asyncio.get_running_loop()
        self._entries: dict[tuple[str, int], Entry] = {}
        self._waiting = Waiting(relay.figures, hello.limits)
        self._batches: dict[asyncio.Task[None], _Sent] = {}
        self._outgoing: list[Cancel | Drain] = []
        self._heard_at = -math.inf
        self._idle_since: float | None = None
        self._reason: str | None = None
        self._ended = asyncio.Event()
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def open(cls, relay: Relay) -> RelayChannel:
        """Return a channel to the instance beside ``relay``.

        Raises:
            SessionLost: The instance cannot be reached.
            ProtocolViolation: What answered is not an instance.
        """
        try:
            hello, heartbeat = await relay.describe()
        except ProtocolViolation:
            raise
        except (OSError, FabricError) as error:
            raise SessionLost(instance="(unknown)", reason=str(error)) from error
        return cls(relay, hello, heartbeat)

    async def run(self, task: Task) -> AsyncIterator[Event]:
        """Run a task and yield its events; see ``Channel.run``."""
        if self._reason is not None:
            raise self._lost(self._reason)
        if self.draining:
            # A worker may bring the instance this task before another brings it the drain.
            yield _fail(task, EngineStopped(reason="it is draining"))
            return
        key = (task.id, task.attempt)
        if key in self._entries:
            raise ProtocolViolation(peer="The hub", reason=f"{key} is sent twice at once")
        entry = self._entries[key] = Entry(task, self._loop, self.hello.limits)
        timer = self._loop.call_at(entry.deadline_at, self._on_deadline, entry)
        self._waiting.append(entry)
        # Later in this turn, so that tasks that come at once also go at once.
        self._loop.call_soon(self._pump)
        try:
            events = await entry.outcome
        finally:
            timer.cancel()
            del self._entries[key]
            if entry.outcome.cancelled() and entry.sent:
                self._post(Cancel(task_id=task.id, attempt=task.attempt))
        for event in events:
            if isinstance(event, Failed) and event.failure.code == SessionLost.code:
                raise event.failure.to_error()
            yield event

    async def cancel(self, task_id: str, attempt: int) -> None:
        """Ask the instance to end a task; its events go on to the last."""
        entry = self._entries.get((task_id, attempt))
        if entry is not None and not entry.sent:
            entry.finish([_fail(entry.task, RequestCancelled())])
        elif entry is not None:
            self._post(Cancel(task_id=task_id, attempt=attempt))

    async def wait_closed(self) -> str:
        """Return the reason once the instance cannot be reached any more."""
        await self._ended.wait()
        return self._reason or ""

    async def drain(self, reason: str) -> None:
        """Ask the instance to finish its tasks and leave."""
        self._post(Drain(reason=reason))
        self.draining = True

    async def close(self, reason: str = "closed by the hub") -> None:
        """End the channel; running tasks are cancelled on the instance."""
        for entry in self._entries.values():
            if entry.sent and not entry.outcome.done():
                self._post(Cancel(task_id=entry.task.id, attempt=entry.task.attempt))
        self._flush()
        self._end(reason)
        self._fail_all()
        jobs = [self._watching, *self._batches]
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)

    # ---- batches -----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what waits while there is room for another batch."""
        figures = self._figures
        while self._reason is None:
            below = None
            if len(self._batches) >= figures.max_batches:
                if len(self._batches) >= figures.max_batches + figures.num_spare:
                    return
                below = min(sent.length_class for sent in self._batches.values())
            batch = self._waiting.take(below)
            if not batch:
                return
            job = asyncio.create_task(self._carry(batch))
            self._batches[job] = _Sent(self._loop.time(), batch[0].length_class)
            job.add_done_callback(self._on_carried)

    async def _carry(self, batch: list[Entry]) -> None:
        now = self._loop.time()
        last = max(entry.deadline_at for entry in batch) + self._figures.grace_s
        error: Exception = self._lost(OVERDUE)
        try:
            async with asyncio.timeout_at(last):
                answers = await self._relay.run([entry.get_task(now) for entry in batch])
            self._heard_at = self._loop.time()
            self._deliver(batch, answers)
            return
        except PayloadTooLarge as reason:
            self._deliver(batch, [[_fail(entry.task, reason)] for entry in batch])
            return
        except ProtocolViolation as reason:
            error = reason
        except asyncio.CancelledError:
            error = self._lost("the instance is idle, and the answer has not come")
            raise
        except (OSError, FabricError, ValueError) as reason:
            error = self._lost(str(reason).rstrip(".") or OVERDUE)
        finally:
            for entry in batch:
                if entry.sent:
                    entry.fail(error)

    def _deliver(self, batch: list[Entry], answers: list[list[Event]]) -> None:
        again = []
        for entry, events in zip(batch, answers, strict=True):
            last = events[-1] if events else None
            too_large = isinstance(last, Failed) and last.failure.code == PayloadTooLarge.code
            if not isinstance(last, Finished | Failed):
                entry.fail(self._violation("an answer without an end"))
            elif too_large and len(batch) > 1 and not entry.outcome.done():
                again.append(entry)
            else:
                self.num_stray_answers += not entry.finish(events)
        # The events of all together did not fit the way back; alone most do.
        self._waiting.separate(again)

    def _on_carried(self, job: asyncio.Task[None]) -> None:
        del self._batches[job]
        if not job.cancelled() and (error := job.exception()) is not None:
            logger.error("a batch failed in the hub", exc_info=error)
        self._pump()

    def _on_deadline(self, entry: Entry) -> None:
        task = entry.task
        if entry.sent:
            # The instance ends it by itself; its batch may have longer to go than its answer can
            # be waited for.
            self._loop.call_later(self._figures.grace_s, entry.fail, self._lost(OVERDUE))
        else:
            expired = DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt)
            entry.finish([_fail(task, expired)])

    # ---- the instance ------------------------------------------------------------------------

    async def _watch(self) -> None:
        misses = 0
        asked_at = self._loop.time()
        figures = self._figures
        while misses < MISSED_POLLS:
            await asyncio.sleep(figures.poll_s)
            quiet = not (self._entries or misses or self.draining)
            if quiet and self._loop.time() < asked_at + figures.idle_poll_s:
                continue
            asked_at = self._loop.time()
            try:
                async with asyncio.timeout(figures.poll_timeout_s):
                    hello, heartbeat = await self._relay.describe()
            except (OSError, FabricError) as error:
                logger.info("%s was not described: %s", self.hello.instance, error)
                misses = 0 if self._heard_at > asked_at else misses + 1
                continue
            misses = 0
            if hello.instance != self.hello.instance:
                break
            self.load = heartbeat.load
            self.draining = self.draining or heartbeat.state is InstanceState.DRAINING
            self._drop_lost_batches(asked_at)
        self._end(f"it did not answer {misses} times" if misses else "another instance answered")
        await asyncio.sleep(LAST_WORDS_S)
        self._fail_all()

    def _drop_lost_batches(self, asked_at: float) -> None:
        """End batches whose tasks are not on the instance and whose answer is overdue.

        The question came after them by the same way, so they are not waiting for a worker.
        """
        if self.load.num_running or self.load.num_waiting:
            self._idle_since = None
            return
        self._idle_since = since = asked_at if self._idle_since is None else self._idle_since
        delivery_s = self._figures.delivery_s
        if delivery_s is not None and self._loop.time() - since > delivery_s:
            for job, sent in self._batches.items():
                if sent.at < since:
                    job.cancel()

    def _post(self, frame: Cancel | Drain) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frame)

    def _flush(self) -> None:
        frames, self._outgoing = self._outgoing, []
        if frames:
            with suppress(OSError, FabricError):
                self._relay.send(frames)

    def _end(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self._ended.set()

    def _fail_all(self) -> None:
        for entry in self._entries.values():
            entry.fail(self._lost(self._reason or ""))

    def _lost(self, reason: str) -> SessionLost:
        return SessionLost(instance=self.hello.instance, reason=reason)

    def _violation(self, reason: str) -> ProtocolViolation:
        return ProtocolViolation(peer=f"The instance {self.hello.instance!r}", reason=reason)


def _fail(task: Task, error: FabricError) -> Failed:
    return Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(error))
