"""What a broker does beside its callers: tasks that end with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable

logger = logging.getLogger(__name__)

Job = Coroutine[None, None, None]


class Background:
    """Tasks of one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, job: Job) -> None:
        """Run something until it ends or ``close`` ends it."""
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def every(self, period_s: float, act: Callable[[], Job]) -> None:
        """Do something again and again; what fails is logged and tried the next time."""
        self.spawn(_forever(period_s, act))

    async def close(self, others: Iterable[asyncio.Task[None]] = ()) -> None:
        """Cancel all tasks, and others with them, and wait for their ends."""
        tasks = [*self._tasks, *others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forever(period_s: float, act: Callable[[], Job]) -> None:
    while True:
        await asyncio.sleep(period_s)
        try:
            await act()
        except Exception:
            logger.exception("periodic work failed; it is tried again")
