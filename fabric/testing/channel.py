"""A channel without a socket: it drives an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fabric.engine.interface import Engine
from fabric.errors import DigestMismatch, EngineStopped, FabricError, SessionLost
from fabric.messages import Event, Failed, Failure, Finished, Hello, Load, Task


class FakeChannel:
    """A ``Channel`` straight to an engine, for tests of what is above channels.

    Args:
        engine: A started engine; the caller closes it.
        site: The site the pretended instance is at.
        instance: Its name.
        deadline_s: Seconds until its pretended block ends.
    """

    streams = True

    def __init__(
        self,
        engine: Engine,
        *,
        site: str = "alpha",
        instance: str = "instance-1",
        deadline_s: float | None = None,
    ) -> None:
        info = engine.info
        self._engine = engine
        self.hello = Hello(
            instance=instance,
            site=site,
            model=info.model,
            digest=info.digest,
            limits=info.limits,
            dtype=info.dtype,
            engine=info.engine,
            deadline_s=deadline_s,
            points=info.points,
        )
        self.draining = False
        self._reason: str | None = None
        self._ended = asyncio.Event()
        self._running: set[asyncio.Queue[Event | SessionLost]] = set()

    @property
    def load(self) -> Load:
        """The engine's load now."""
        return self._engine.load()

    async def run(self, task: Task) -> AsyncIterator[Event]:
        """Run a task on the engine; see ``Channel.run``."""
        if self._reason is not None:
            raise SessionLost(instance=self.hello.instance, reason=self._reason)
        if (refusal := self._refusal(task)) is not None:
            yield Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(refusal))
            return
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event | SessionLost] = asyncio.Queue()
        self._running.add(arrived)
        ended = False
        try:
            self._engine.submit(task, lambda event: _hand_over(loop, arrived, event))
            while not ended:
                event = await arrived.get()
                if isinstance(event, SessionLost):
                    raise event
                ended = isinstance(event, Finished | Failed)
                if ended:
                    self._leave(arrived)
                yield event
        finally:
            if not ended:
                self._engine.cancel(task.id, task.attempt)
                self._leave(arrived)

    async def cancel(self, task_id: str, attempt: int) -> None:
        """Ask the instance to end a task; its events go on to the last."""
        self._engine.cancel(task_id, attempt)

    async def wait_closed(self) -> str:
        """Return the reason once the channel has ended."""
        await self._ended.wait()
        return self._reason or ""

    async def drain(self, reason: str) -> None:
        """Take no more tasks, and end when the running ones have."""
        self.draining = True
        if not self._running:
            self.lose(reason)

    async def close(self, reason: str = "closed by the hub") -> None:
        """End the channel."""
        self.lose(reason)

    def lose(self, reason: str) -> None:
        """End the channel as if the connection had broken."""
        if self._reason is None:
            self._reason = reason
            self._ended.set()
            for arrived in self._running:
                arrived.put_nowait(SessionLost(instance=self.hello.instance, reason=reason))

    def _refusal(self, task: Task) -> FabricError | None:
        if self.draining:
            return EngineStopped(reason="it is draining")
        if task.digest != self.hello.digest:
            return DigestMismatch(
                name=self.hello.model, expected=task.digest, actual=self.hello.digest
            )
        return None

    def _leave(self, arrived: asyncio.Queue[Event | SessionLost]) -> None:
        self._running.discard(arrived)
        if self.draining and not self._running:
            self.lose("drained")


def _hand_over(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[Event | SessionLost], event: Event
) -> None:
    # The engine may outlive the loop of the test that used it.
    if not loop.is_closed():
        loop.call_soon_threadsafe(arrived.put_nowait, event)
