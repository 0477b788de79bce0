"""The Parsl channel: tasks travel to an instance through a HighThroughputExecutor's workers.

It needs no connection between the hub and the instance beyond Parsl's own, and in exchange gives
all events at the end. Results come back through Parsl's pickles, so it is for executors whose
workers the hub's operator runs, never across trust domains.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress

from fabric.errors import EngineStopped, ProtocolViolation, SessionLost
from fabric.launch import worker
from fabric.messages import (
    Accepted,
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
    PromptScored,
    Task,
    Token,
    parse_from_instance,
)

MISSED_POLLS = 3

Submit = Callable[..., "Future[object]"]
"""``submit(function, *args)`` runs the function on some worker, as ``Block.submit`` does."""

logger = logging.getLogger(__name__)


class ParslChannel:
    """A ``Channel`` over an executor's workers.

    ``open`` asks the instance what it is. At most ``num_relays`` tasks run at once, each keeping
    one worker; the executor needs one worker more, so that a cancellation always finds one free.
    """

    streams = False

    def __init__(
        self,
        submit: Submit,
        hello: Hello,
        *,
        direct_url: str,
        direct_token: str,
        num_relays: int,
        poll_s: float,
    ) -> None:
        self.hello = hello
        self.load: Load = hello.load
        self.draining = False
        self._submit = submit
        self._address = (direct_url, direct_token)
        self._poll_s = poll_s
        self._slots = asyncio.Semaphore(num_relays)
        self._reason: str | None = None
        self._ended = asyncio.Event()
        self._closed = asyncio.Event()
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def open(
        cls,
        submit: Submit,
        *,
        direct_url: str,
        direct_token: str,
        num_relays: int = 1,
        poll_s: float = 2.0,
    ) -> ParslChannel:
        """Return a channel to the instance at ``direct_url``.

        Args:
            submit: Runs a function on a worker that can reach the instance.
            direct_url: The instance's direct route.
            direct_token: Its direct token.
            num_relays: How many tasks may run at once; fewer than there are workers.
            poll_s: How often the instance is asked for its load; three misses end the channel.

        Raises:
            SessionLost: The instance cannot be reached from a worker.
        """
        try:
            lines = await _result(submit(worker.describe, direct_url, direct_token))
        except Exception as error:
            raise SessionLost(instance=direct_url, reason=str(error)) from error
        hello = parse_from_instance(lines[0])
        if not isinstance(hello, Hello):
            raise ProtocolViolation(peer="The instance", reason=f"a {hello.type} before its hello")
        return cls(
            submit,
            hello,
            direct_url=direct_url,
            direct_token=direct_token,
            num_relays=num_relays,
            poll_s=poll_s,
        )

    async def run(self, task: Task) -> AsyncIterator[Event]:
        """Run a task on a worker and yield its events; see ``Channel.run``."""
        self._raise_if_ended()
        if self.draining:
            # Another worker may bring the instance this task before it hears of the drain.
            stopped = Failure.of(EngineStopped(reason="it is draining"))
            yield Failed(task_id=task.id, attempt=task.attempt, failure=stopped)
            return
        await self._slots.acquire()
        try:
            self._raise_if_ended()
            relayed = self._submit(worker.relay, *self._address, task.model_dump_json())
        except BaseException:
            self._slots.release()
            raise
        loop = asyncio.get_running_loop()
        relayed.add_done_callback(lambda _: _call(loop, self._slots.release))
        for event in await self._events(task, relayed):
            yield event

    async def cancel(self, task_id: str, attempt: int) -> None:
        """Ask the instance to end a task; its events go on to the last."""
        self._post(Cancel(task_id=task_id, attempt=attempt))

    async def wait_closed(self) -> str:
        """Return the reason once the instance cannot be reached any more."""
        await self._ended.wait()
        return self._reason or ""

    async def drain(self, reason: str) -> None:
        """Ask the instance to finish its tasks and leave."""
        self._post(Drain(reason=reason))
        self.draining = True

    async def close(self) -> None:
        """End the channel; running tasks are cancelled on the instance."""
        self._end("closed by the hub")
        self._closed.set()
        self._watching.cancel()
        await asyncio.wait([self._watching])

    async def _events(self, task: Task, relayed: Future[object]) -> list[Event]:
        """Return the events of a relayed task, or cancel it if nobody waits for them any more.

        An instance that is gone does not end the wait: its relay says so, or brings an answer that
        was on its way.
        """
        closed = asyncio.ensure_future(self._closed.wait())
        outcome = asyncio.ensure_future(_result(relayed))
        try:
            await asyncio.wait([outcome, closed], return_when=asyncio.FIRST_COMPLETED)
            if not outcome.done():
                self._raise_if_ended()
            return _parse(task, self.hello.instance, outcome.result())
        except ConnectionError as error:
            raise SessionLost(instance=self.hello.instance, reason=str(error)) from error
        finally:
            if not relayed.done():
                self._post(Cancel(task_id=task.id, attempt=task.attempt))
            closed.cancel()
            outcome.cancel()

    async def _watch(self) -> None:
        misses = 0
        while misses < MISSED_POLLS:
            await asyncio.sleep(self._poll_s)
            try:
                _, line = await _result(self._submit(worker.describe, *self._address))
            except ConnectionError:
                misses += 1
                continue
            misses = 0
            heartbeat = parse_from_instance(line)
            if isinstance(heartbeat, Heartbeat):
                self.load = heartbeat.load
                self.draining = self.draining or heartbeat.state is InstanceState.DRAINING
        self._end(f"it did not answer {misses} times")

    def _post(self, frame: Cancel | Drain) -> None:
        with suppress(ConnectionError):
            self._submit(worker.send, *self._address, frame.model_dump_json())

    def _end(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self._ended.set()

    def _raise_if_ended(self) -> None:
        if self._reason is not None:
            raise SessionLost(instance=self.hello.instance, reason=self._reason)


async def _result(future: Future[object]) -> list[str]:
    """Return what a worker returned; a lost worker and a lost instance are both lost connections.

    Parsl's future is only watched, never wrapped: cancelling it would end Parsl's result thread.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    future.add_done_callback(lambda _: _call(loop, done.set))
    await done.wait()
    error = future.exception()
    if error is not None:
        raise ConnectionError(str(error) or type(error).__name__) from error
    lines = future.result()
    assert isinstance(lines, list)
    return lines


def _parse(task: Task, instance: str, lines: list[str]) -> list[Event]:
    events: list[Event] = []
    for line in lines:
        event = parse_from_instance(line)
        if not isinstance(event, Accepted | PromptScored | Token | Finished | Failed) or (
            (event.task_id, event.attempt) != (task.id, task.attempt)
        ):
            raise ProtocolViolation(
                peer=f"The instance {instance!r}", reason=f"a {event.type} that is not of the task"
            )
        events.append(event)
    return events


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
