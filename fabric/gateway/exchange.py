"""One HTTP exchange and the runs behind it: begun together, cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from fabric.broker import Run
from fabric.broker.programs import ProgramBounds
from fabric.gateway.hub import caller_of, hub_of
from fabric.gateway.metrics import Metrics
from fabric.gateway.request_ids import name_after_run
from fabric.messages import Placed, Request, RunCompleted, RunEvent, RunFailed, Token


class Exchange:
    """The runs of one HTTP request, one a prompt.

    While its context is open a client that goes away cancels them: each then ends with its
    ``RunFailed`` and the caller unwinds as for any other failure.

    Args:
        runs: Admitted runs, and
        requests: what was asked, in the same order.
        receive: The request's channel, its body already read.
        metrics: Hears of latencies.
        began_at: When the request had been read, on ``time.perf_counter``.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        requests: Sequence[Request],
        receive: Receive,
        metrics: Metrics,
        *,
        began_at: float,
    ) -> None:
        self.runs = runs
        self.requests = requests
        self._receive = receive
        self._metrics = metrics
        self._began_at = began_at
        self._unfinished = set(runs)
        self._current: Run | None = None
        self._departure: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls,
        http: HttpRequest,
        requests: Sequence[Request],
        *,
        bounds: ProgramBounds | None = None,
    ) -> Self:
        """Admit all requests, or none.

        Args:
            http: The HTTP request, its body read; the reply will carry the first run's id.
            requests: What its caller asks.
            bounds: Of a program, what it may take.

        Raises:
            FabricError: One was refused.
        """
        began_at = time.perf_counter()
        hub, caller = hub_of(http), caller_of(http)
        runs: list[Run] = []
        try:
            for request in requests:
                runs.append(await hub.broker.submit(caller, request, bounds=bounds))
        except BaseException:
            for run in runs:
                await run.cancel()
            raise
        name_after_run(http, runs[0].id)
        return cls(runs, requests, http.receive, hub.metrics, began_at=began_at)

    async def __aenter__(self) -> Self:
        self._departure = asyncio.create_task(self._cancel_on_departure())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._departure is not None
        self._departure.cancel()
        # Its error will hold this exchange: what holds each other waits for the garbage collector.
        self._departure = None
        for run in self._unfinished:
            await run.cancel()

    @property
    def has_more(self) -> bool:
        """Whether the next event is there already."""
        return self._current is not None and self._current.has_more

    async def events(self) -> AsyncIterator[tuple[int, RunEvent]]:
        """Yield the events of the runs with their index, one run after the other.

        All runs compute at the same time: what the later ones say waits until they are asked.
        """
        for index, (run, request) in enumerate(zip(self.runs, self.requests, strict=True)):
            model = request.model.partition("@")[0]
            last_at, self._current = None, run
            async for event in run.events():
                match event:
                    case Token(choice=0):
                        now = time.perf_counter()
                        if last_at is not None:
                            self._metrics.token_gap(model, now - last_at)
                        last_at = now
                    case Placed(attempt=1):
                        self._metrics.placed(model, time.perf_counter() - self._began_at)
                    case RunCompleted():
                        self._metrics.run_completed(model, event)
                        self._unfinished.discard(run)
                    case RunFailed():
                        self._unfinished.discard(run)
                yield index, event

    async def _cancel_on_departure(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        for run in self.runs:
            await run.cancel()
