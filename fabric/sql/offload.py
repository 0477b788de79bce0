"""One thread for a database, so that an event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from fabric.sql.database import Database

P = ParamSpec("P")
T = TypeVar("T")


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
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._urgent: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def __call__(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Return the future of ``function(*args, **kwargs)``. Call it on an event loop."""
        return self._queue(self._calls, partial(function, *args, **kwargs))

    def urgent(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """As a call, but before all that wait and are not urgent."""
        return self._queue(self._urgent, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Finish the calls that were made and end the thread. Calling it twice is harmless."""
        self._thread.shutdown(wait=True)

    def _queue(
        self, lane: deque[tuple[Future[Any], Callable[[], Any]]], call: Callable[[], T]
    ) -> asyncio.Future[T]:
        future: Future[T] = Future()
        lane.append((future, call))
        self._thread.submit(self._run_next)
        return asyncio.shield(asyncio.wrap_future(future))

    def _run_next(self) -> None:
        """Run the call that is next now; one is there for each time this is submitted."""
        future, call = (self._urgent or self._calls).popleft()
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
