"""An event loop on a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for any thread. The thread starts with the first one.

    One loop gives every request of a client what threads cannot: a running request can be
    cancelled, and its connection closed, from anywhere.

    Args:
        on_close: Awaited on the loop as its last act.
    """

    def __init__(self, on_close: Callable[[], Awaitable[None]]) -> None:
        self._on_close = on_close
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._closed = False

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; cancelling the future cancels it.

        Raises:
            RuntimeError: The client is closed.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._get_loop())
        except RuntimeError:
            # Nothing else: at an interrupt the loop may have it already, and closing a coroutine
            # that runs on another thread breaks it in the middle.
            coroutine.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interrupt of the waiting thread cancels it.

        Raises:
            RuntimeError: The client is closed.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs and end the thread. Twice is harmless."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread and self._loop and self._stop:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise RuntimeError("This client is closed; make a new one.")
            if self._thread is None:
                started = threading.Event()
                self._thread = threading.Thread(
                    target=self._serve, args=(started,), name="fabric-sdk", daemon=True
                )
                self._thread.start()
                started.wait()
            assert self._loop is not None
            return self._loop

    def _serve(self, started: threading.Event) -> None:
        async def wait() -> None:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            started.set()
            await self._stop.wait()
            running = asyncio.all_tasks() - {asyncio.current_task()}
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._on_close()

        with asyncio.Runner() as runner:
            runner.run(wait())
