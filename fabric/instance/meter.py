"""Asks the hub before a raw call runs, and tells it afterwards what the call consumed.

A raw call comes by the direct route, so the hub learns of it here only. What a call consumed is
said again on every session, and now and then on one that lasts, until the hub has answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from fabric.errors import Duplicate, FabricError, HubNotConnected, RequestCancelled
from fabric.messages import (
    Event,
    Failed,
    Finished,
    Metered,
    Redeem,
    Redeemed,
    Settled,
    Task,
    Token,
    Usage,
)

REMIND_S = 5.0

Key = tuple[str, int]
Post = Callable[[Redeem | Metered], None]
Sink = Callable[[Event], None]


class Meter:
    """The raw calls of one instance, over whichever session with the hub is open.

    Used on one event loop; sinks may be called on any thread.

    Args:
        instance: Its name, for errors.
    """

    def __init__(self, instance: str) -> None:
        self.idle = asyncio.Event()
        """Set while no call is asked for, runs, or waits to be settled."""
        self.idle.set()
        self._instance = instance
        self._post: Post | None = None
        self._asked: dict[Key, asyncio.Future[FabricError | None]] = {}
        self._running: set[Key] = set()
        self._unsettled: dict[Key, tuple[Metered, float]] = {}

    # ---- the session with the hub ------------------------------------------------------------

    def connect(self, post: Post) -> None:
        """Use a session that has been accepted, and say on it what is not settled.

        Args:
            post: Sends a frame, or does nothing if the session has ended.
        """
        self._post = post
        self.remind(older_than_s=0.0)

    def disconnect(self, post: Post) -> None:
        """A session has ended: what was asked on it and not answered does not run."""
        if self._post is not post:
            return
        self._post = None
        for answer in self._asked.values():
            if not answer.done():
                answer.set_result(self._not_connected("its session ended while it asked"))

    def remind(self, *, older_than_s: float = REMIND_S) -> None:
        """Say again what the hub has not answered for so long."""
        now = time.monotonic()
        for key, (metered, said_at) in self._unsettled.items():
            if self._post is not None and now - said_at >= older_than_s:
                self._unsettled[key] = metered, now
                self._post(metered)

    def take(self, frame: Redeemed | Settled) -> None:
        """Take an answer of the hub's; what was admitted for nobody is given back."""
        key = (frame.task_id, frame.attempt)
        answer = self._asked.get(key)
        if isinstance(frame, Settled):
            self._unsettled.pop(key, None)
        elif answer is not None and not answer.done():
            answer.set_result(frame.failure.to_error() if frame.failure else None)
        elif frame.failure is None and key not in self._running:
            self._end(_nothing(key, RequestCancelled.code))
        self._look_idle()

    # ---- calls -------------------------------------------------------------------------------

    async def redeem(self, task: Task) -> None:
        """Return once the hub has admitted a task, which is then to be run on a ``metered`` sink.

        If it is cancelled, what was held meanwhile goes back.

        Raises:
            HubNotConnected: There is no session to ask on.
            FabricError: What the hub refused it with.
        """
        assert task.ticket is not None
        key = (task.id, task.attempt)
        if self._post is None:
            raise self._not_connected("its session is not open")
        if key in self._asked or key in self._running:
            raise Duplicate(kind="run", name=task.id)
        answer = self._asked[key] = asyncio.get_running_loop().create_future()
        self.idle.clear()
        self._post(
            Redeem(task_id=task.id, attempt=task.attempt, ticket=task.ticket, request=task.request)
        )
        try:
            refusal = await answer
            if refusal is None:
                self._running.add(key)
                return
        except asyncio.CancelledError:
            # The hub may have admitted it, or may yet do so (see ``take``).
            self._end(_nothing(key, RequestCancelled.code))
            raise
        finally:
            del self._asked[key]
            self._look_idle()
        if isinstance(refusal, HubNotConnected):
            self._end(_nothing(key, refusal.code))
        raise refusal

    def metered(self, task: Task, sink: Sink) -> Sink:
        """Return a sink for an admitted task that also notes what it consumed at its end."""
        loop = asyncio.get_running_loop()
        began_at = time.monotonic()
        first_token_s: float | None = None

        def take(event: Event) -> None:
            nonlocal first_token_s
            since_s = time.monotonic() - began_at
            if isinstance(event, Token) and first_token_s is None:
                first_token_s = since_s
            elif isinstance(event, Finished | Failed):
                metered = Metered(
                    task_id=task.id,
                    attempt=task.attempt,
                    usage=event.usage,
                    failure_code=event.failure.code if isinstance(event, Failed) else None,
                    first_token_s=first_token_s,
                    total_s=since_s,
                )
                with suppress(RuntimeError):  # the loop has ended, and with it all sessions
                    loop.call_soon_threadsafe(self._end, metered)
            sink(event)

        return take

    def _end(self, metered: Metered) -> None:
        key = (metered.task_id, metered.attempt)
        self._running.discard(key)
        self.idle.clear()
        self._unsettled[key] = metered, time.monotonic()
        if self._post is not None:
            self._post(metered)

    def _look_idle(self) -> None:
        if not (self._asked or self._running or self._unsettled):
            self.idle.set()

    def _not_connected(self, reason: str) -> HubNotConnected:
        return HubNotConnected(instance=self._instance, reason=reason)


def _nothing(key: Key, code: str) -> Metered:
    return Metered(task_id=key[0], attempt=key[1], usage=Usage(), failure_code=code)
