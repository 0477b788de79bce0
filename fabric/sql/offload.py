"""One thread for a database, so that an event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, TypeVar

from fabric.sql.database import MAX_LOG_PAGES, Database

CHECKPOINT_S = 2.0
MAX_CHECKPOINT_S = 30.0
LOG_PAGES = MAX_LOG_PAGES // 2
"""How often the log is copied: so that it is about so long by then, within these times."""

P = ParamSpec("P")
T = TypeVar("T")

_Call = tuple["asyncio.Future[Any] | None", Callable[[], Any]]

logger = logging.getLogger(__name__)


class Offload:
    """Runs calls on one thread in the order in which they were made, the urgent ones first.

    A call is queued at once, not when its future is awaited, and once queued it runs even if
    nobody waits for it any more. So what was queued to be written is there for every later call
    that is not urgent.

    Args:
        database: What the calls are about; for those that want to share a transaction.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._urgent: deque[_Call] = deque()
        self._calls: deque[_Call] = deque()
        self._turns: SimpleQueue[bool] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False

    def __call__(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Return the future of ``function(*args, **kwargs)``. Call it on an event loop."""
        return self._await(self._calls, partial(function, *args, **kwargs))

    def post(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """As a call that nobody waits for: the loop is not woken. What it raises is logged."""
        self._queue(self._calls, None, partial(function, *args, **kwargs))

    def urgent(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """As a call, but before all that wait and are not urgent."""
        return self._await(self._urgent, partial(function, *args, **kwargs))

    @asynccontextmanager
    async def checkpointing(self) -> AsyncIterator[None]:
        """Keep the database's log short meanwhile, from a thread that no call waits for.

        Otherwise one commit in some dozens copies the log, which takes 15 ms and more.
        """
        task = asyncio.create_task(self._checkpoint())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def close(self) -> None:
        """Finish the calls that were made and end the thread. Calling it twice is harmless."""
        if not self._closed:
            self._closed = True
            self._turns.put(False)
        if self._thread is not None:
            self._thread.join()

    def _await(self, lane: deque[_Call], call: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue(lane, future, call)
        return future

    def _queue(
        self, lane: deque[_Call], future: asyncio.Future[Any] | None, call: Callable[[], object]
    ) -> None:
        if self._closed:
            raise RuntimeError("The database's thread has ended.")
        if self._thread is None:
            self._thread = Thread(target=self._run, name="database", daemon=True)
            self._thread.start()
        lane.append((future, call))
        self._turns.put(True)

    async def _checkpoint(self) -> None:
        pause_s = CHECKPOINT_S
        while True:
            await asyncio.sleep(pause_s)
            with suppress(Exception):  # The next one copies what this one could not.
                num_pages = await asyncio.to_thread(self.database.checkpoint)
                pause_s = next_pause_s(pause_s, num_pages)

    # ---- on the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        """Run the calls; one is there for each turn."""
        with self.database.sharing():
            while self._turns.get():
                _answer(*(self._urgent or self._calls).popleft())


def _answer(future: asyncio.Future[Any] | None, call: Callable[[], Any]) -> None:
    """Run a call, and give its answer to the loop that may wait for it."""
    if future is None:
        try:
            call()
        except BaseException:
            logger.exception("a call to the database that nobody waits for failed")
        return
    try:
        answer = partial(_deliver, future, call(), None)
    except BaseException as error:
        answer = partial(_deliver, future, None, error)
    with suppress(RuntimeError):  # The loop is closed: nobody waits for it any more.
        future.get_loop().call_soon_threadsafe(answer)


def _deliver(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Give an answer to those who still wait for it."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def next_pause_s(pause_s: float, num_pages: int) -> float:
    """Return the seconds until the log is copied again, which has grown so long in the last."""
    wanted_s = pause_s * LOG_PAGES / max(1, num_pages)
    return max(CHECKPOINT_S, min(wanted_s, 2 * pause_s, MAX_CHECKPOINT_S))
