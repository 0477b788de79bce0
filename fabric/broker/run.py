"""A run as its client sees it, and the pipe between the broker and that client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from fabric.messages import RunCompleted, RunEvent, RunFailed


class Run:
    """One admitted request.

    The client reads ``events`` and may ``cancel``; the broker writes with ``put``, and waits for
    ``room`` when the client does not keep up. The last event always fits.

    Args:
        run_id: The request's id.
        model: The model's catalogued name.
        started_at: When the request came in, on the monotonic clock.
        max_backlog: Events that may wait for the client.
        leave: Tells the broker that the client is gone.
    """

    def __init__(
        self,
        run_id: str,
        *,
        model: str,
        started_at: float,
        max_backlog: int,
        leave: Callable[[], None],
    ) -> None:
        self.id = run_id
        self.model = model
        self.started_at = started_at
        self.has_tokens = False
        self._max_backlog = max_backlog
        self._leave = leave
        self._backlog: deque[RunEvent] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._ended = asyncio.Event()
        self._gone = False

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yield what happens: ``Placed``, ``PromptScored`` and ``Token`` events, and at last one
        ``RunCompleted`` or ``RunFailed``.

        To be read by one reader. Closing the iterator early cancels the run.
        """
        try:
            while True:
                while self._backlog:
                    event = self._backlog.popleft()
                    if len(self._backlog) * 2 <= self._max_backlog:
                        self._room.set()
                    yield event
                if self._ended.is_set():
                    return
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            self._withdraw()

    @property
    def has_more(self) -> bool:
        """Whether an event is there that was not read yet."""
        return bool(self._backlog)

    async def cancel(self) -> None:
        """End the run and return when it has ended; what was computed is charged.

        Unread events are dropped; a reader still gets the last one. Cancelling a run that has
        ended changes nothing.
        """
        self._withdraw()
        await self._ended.wait()

    # ---- the broker's side ----------------------------------------------------------------------

    def put(self, event: RunEvent) -> None:
        """Add an event; after the last one nothing may follow."""
        self._backlog.append(event)
        if isinstance(event, RunCompleted | RunFailed):
            self._ended.set()
            self._room.set()
        elif len(self._backlog) >= self._max_backlog and not self._gone:
            self._room.clear()
        self._arrived.set()

    @property
    def full(self) -> bool:
        """Whether the broker should wait for ``room``."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Wait until the client has taken half of the backlog, or the run has ended."""
        await self._room.wait()

    def _withdraw(self) -> None:
        if not self._ended.is_set() and not self._gone:
            self._gone = True
            self._backlog.clear()
            self._room.set()
            self._leave()
