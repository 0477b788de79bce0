"""Tasks to Globus Compute endpoints: one SDK Executor for each target, within the service's limits.

An Executor ends for good with the first submit that fails. Here it is then replaced, alone: what it
had not sent goes out through the next one, what it had sent is still waited for. A submit whose
answer got lost is repeated, so a task may run twice; functions are idempotent on the ids they get.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from uuid import UUID

from fabric.compute.lane import Job, Lane
from fabric.compute.limits import RequestBudget, ServiceLimits
from fabric.compute.status import EndpointStatus, StatusBoard
from fabric.compute.target import JSON, ComputeTarget, measure_payload
from fabric.errors import PayloadTooLarge, ServiceUnreachable

if TYPE_CHECKING:
    from fabric.compute.client import ServiceClient

CLOSE_TIMEOUT_S = 15.0

logger = logging.getLogger(__name__)


class ComputePool:
    """All of one identity's tasks and questions to the service.

    Thread-safe. It keeps one thread of its own, and two of the SDK's for each target in use.

    Args:
        limits: The service's figures, or this process's part of them.
        client_factory: Returns a client that asks the given budget before every request
            (``get_client``).
        shared: The file in which all processes of the identity count requests (``RequestBudget``).
    """

    def __init__(
        self,
        limits: ServiceLimits | None = None,
        client_factory: Callable[[RequestBudget], ServiceClient] | None = None,
        shared: Path | None = None,
    ) -> None:
        self.limits = limits or ServiceLimits()
        self.budget = RequestBudget(self.limits, shared)
        self._client_factory = client_factory or _get_default_client
        self._changed = threading.Condition()
        self._lanes: dict[ComputeTarget, Lane] = {}
        self._client: ServiceClient | None = None
        self._board: StatusBoard | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> ComputePool:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def client(self) -> ServiceClient:
        """A client on the pool's budget, for calls that are not tasks. They may block.

        Raises:
            ServiceUnreachable: The pool has not been started, or was closed.
        """
        if self._client is None or self._closed:
            raise ServiceUnreachable(reason="the pool is not running")
        return self._client

    @property
    def num_stray_results(self) -> int:
        """Results of tasks that nobody waited for any more, dropped."""
        with self._changed:
            return sum(lane.num_stray_results for lane in self._lanes.values())

    def start(self) -> None:
        """Get a token and start. Calling it twice is harmless.

        Raises:
            CredentialsRefused: Globus does not accept the credentials, or nobody has logged in.
            ServiceUnreachable: Globus Auth does not answer.
        """
        with self._changed:
            if self._thread is not None:
                return
            self._client = self._client_factory(self.budget)
            # Status has a client of its own: the SDK's lets one request through at a time, and a
            # submit may take minutes while the service is down.
            self._board = StatusBoard(self._client_factory(self.budget), self.budget.pause)
            self._thread = threading.Thread(target=self._run, name="compute-pool", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End all threads; tasks without a result fail with ``TaskLost``. Twice is harmless."""
        with self._changed:
            self._closed = True
            self.budget.close()
            lanes = list(self._lanes.values())
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for lane in lanes:
            lane.close(CLOSE_TIMEOUT_S)

    def submit(
        self,
        target: ComputeTarget,
        function_id: UUID,
        args: tuple[JSON, ...] = (),
        *,
        timeout_s: float | None = None,
    ) -> Future[JSON]:
        """Run a registered function on an endpoint and return at once.

        The future can be cancelled until its task is on its way. It fails with ``TaskFailed``
        (the function raised), ``TaskLost`` (no result will come), ``TaskTimedOut``,
        ``ServiceRefused``, ``CredentialsRefused``, or ``PayloadTooLarge`` (the result).

        Args:
            target: The endpoint and its configuration.
            function_id: The function, by its id.
            args: Its arguments, JSON.
            timeout_s: Seconds until the result must be here, waiting to be sent included.

        Raises:
            PayloadTooLarge: The arguments do not fit one request.
            TypeError: They are not JSON.
            ServiceUnreachable: The pool has not been started, or was closed.
        """
        size_bytes = measure_payload(args)
        if size_bytes > self.limits.request_bytes:
            raise PayloadTooLarge(
                size_bytes=size_bytes,
                cap_bytes=self.limits.request_bytes,
                remedy="send less at once, or pass it by a payload store",
            )
        job = Job(function_id, args, size_bytes, timeout_s)
        with self._changed:
            if self._client is None or self._closed:
                raise ServiceUnreachable(reason="the pool is not running")
            lane = self._lanes.get(target)
            if lane is None:
                lane = Lane(target, self._client, self.limits, self._wake, self.budget.pause)
                self._lanes[target] = lane
            lane.add(job)
            self._changed.notify_all()
        return job.future

    def status(self, endpoint_id: UUID) -> EndpointStatus:
        """Return whether an endpoint is online, as known for at most some seconds; may block.

        Raises:
            ServiceRefused: There is no such endpoint, or it is not ours to see.
            ServiceUnreachable: The service does not answer.
            CredentialsRefused: Nor to these credentials.
        """
        if self._board is None or self._closed:
            raise ServiceUnreachable(reason="the pool is not running")
        return self._board.status(endpoint_id)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                waits = [lane.get_wait_s(now) for lane in self._lanes.values()]
                if (wait_s := min(waits, default=None)) is None or wait_s > 0:
                    self._changed.wait(wait_s)
                lanes = list(self._lanes.values())
            for lane in lanes:
                try:
                    lane.step(time.monotonic())
                except Exception:
                    logger.exception("compute lane failed")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _get_default_client(budget: RequestBudget) -> ServiceClient:
    from fabric.compute.client import get_client

    return get_client(budget)
