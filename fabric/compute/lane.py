"""One target's tasks, and the SDK Executor that carries them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from fabric.compute.limits import ServiceLimits
from fabric.compute.target import JSON, ComputeTarget
from fabric.errors import (
    AuthError,
    FabricError,
    ServiceBusy,
    ServiceRefused,
    ServiceUnreachable,
    TaskLost,
    TaskTimedOut,
)

if TYPE_CHECKING:
    from globus_compute_sdk.sdk.asynchronous.compute_future import ComputeFuture

    from fabric.compute.client import ServiceClient
    from fabric.compute.executor import ServiceExecutor

MAX_BACKOFF_S = 10.0
MAX_WAIT_S = 1.0
TICK_S = 0.01
"""How often a submit that is under way is looked at."""

logger = logging.getLogger(__name__)


class Job:
    """One task; ``future`` is its submitter's."""

    __slots__ = (
        "alone",
        "args",
        "deadline",
        "function_id",
        "future",
        "inner",
        "size_bytes",
        "timeout_s",
    )

    def __init__(
        self, function_id: UUID, args: tuple[JSON, ...], size_bytes: int, timeout_s: float | None
    ) -> None:
        self.function_id = function_id
        self.args = args
        self.size_bytes = size_bytes
        self.timeout_s = timeout_s
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.future: Future[JSON] = Future()
        self.inner: ComputeFuture | None = None
        """The SDK's future of it. Never cancelled: the SDK fails on those that are."""
        self.alone = False
        """Whether it is sent by itself, after a submit that was refused for one of its tasks."""

    @property
    def sent(self) -> bool:
        """Whether the service has it."""
        return self.task_id is not None

    @property
    def task_id(self) -> str | None:
        """The service's name for it."""
        return None if self.inner is None else self.inner.task_id

    @property
    def failed(self) -> bool:
        """Whether its submit has failed."""
        return self.inner is not None and self.inner.done()


class Lane:
    """The tasks of one target. Calls of ``step`` come from one thread; the rest from any.

    Args:
        target: Where they go.
        client: What their Executor sends with.
        limits: The service's figures.
        wake: Called when something happened that ``step`` should look at.
        pause: Called with the seconds in which the service wants nothing of this identity.
    """

    def __init__(
        self,
        target: ComputeTarget,
        client: ServiceClient,
        limits: ServiceLimits,
        wake: Callable[[], None],
        pause: Callable[[float], None],
    ) -> None:
        self._target = target
        self._client = client
        self._limits = limits
        self._wake = wake
        self._pause = pause
        self._lock = threading.RLock()
        self._open: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._wave: list[Job] = []
        """Handed to the Executor, and not known to be sent."""
        self._wave_size = 0
        self._executor: ServiceExecutor | None = None
        self._task_group_id: UUID | None = None
        self._retry_at = 0.0
        self._num_failures = 0
        self._closed = False
        self.num_stray_results = 0

    def add(self, job: Job) -> None:
        """Queue a task."""
        with self._lock:
            self._open.add(job)
            self._waiting.append(job)

    def get_wait_s(self, now: float) -> float:
        """Return in how many seconds ``step`` has something to do."""
        with self._lock:
            if self._wave:
                return TICK_S
            deadlines = [job.deadline for job in self._open if job.deadline is not None]
            wait_s = min(deadlines, default=now + MAX_WAIT_S) - now
            if self._waiting:
                wait_s = min(wait_s, self._retry_at - now)
            return wait_s

    def step(self, now: float) -> None:
        """End what is overdue, and send the next tasks once the last ones are on their way."""
        self._expire(now)
        with self._lock:
            if any(job.sent for job in self._wave):
                self._num_failures = 0
            self._wave = [job for job in self._wave if not job.sent and not job.failed]
            if self._wave or now < self._retry_at:
                return
            wave = self._wave = self._take_wave()
            self._wave_size = len(wave)
        if wave:
            self._send(wave)

    def close(self, timeout_s: float) -> None:
        """Fail what is open with ``TaskLost`` and end the SDK's threads."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
            unfinished = list(self._open)
            self._waiting.clear()
        for job in unfinished:
            reason = "the pool was closed" + ("" if job.sent else " before it was sent")
            self._settle(job, TaskLost(task_id=job.task_id, reason=reason))
        if executor is not None:
            self._task_group_id = executor.task_group_id
            executor.stop()
        if self._task_group_id is not None:
            from fabric.compute.executor import end_result_watcher

            end_result_watcher(self._task_group_id, timeout_s)

    def _expire(self, now: float) -> None:
        with self._lock:
            overdue = [job for job in self._open if job.deadline is not None and job.deadline < now]
        for job in overdue:
            assert job.timeout_s is not None
            self._settle(job, TaskTimedOut(timeout_s=job.timeout_s, sent=job.sent))

    def _take_wave(self) -> list[Job]:
        """Return waiting tasks that fit one submit together."""
        wave: list[Job] = []
        size_bytes = 0
        while self._waiting and len(wave) < self._limits.tasks_per_request:
            job = self._waiting[0]
            size_bytes += job.size_bytes
            if wave and (job.alone or size_bytes > self._limits.request_bytes):
                break
            self._waiting.popleft()
            if job not in self._open:
                continue
            if not job.future.running() and not job.future.set_running_or_notify_cancel():
                self._open.discard(job)
                continue
            wave.append(job)
            if job.alone:
                break
        return wave

    def _send(self, wave: list[Job]) -> None:
        executor = self._executor or self._get_executor()
        for position, job in enumerate(wave):
            try:
                inner = executor.send(job.function_id, job.args)
            except RuntimeError:  # somebody ended it
                with self._lock:
                    self._executor = None
                    self._wave = wave[:position]
                    self._waiting.extendleft(reversed(wave[position:]))
                return
            job.inner = inner
            inner.add_done_callback(partial(self._on_done, job, executor))

    def _get_executor(self) -> ServiceExecutor:
        from fabric.compute.executor import ServiceExecutor

        self._executor = ServiceExecutor(
            self._client, self._target, self._limits, self._task_group_id
        )
        return self._executor

    # ---- on the SDK's threads ----------------------------------------------------------------

    def _on_done(self, job: Job, executor: ServiceExecutor, inner: ComputeFuture) -> None:
        from fabric.compute.executor import explain

        error = CancelledError() if inner.cancelled() else inner.exception()
        if job.sent:
            self._task_group_id = executor.task_group_id
            self._settle(job, None if error is None else explain(error, inner.task_id), inner)
        else:
            assert error is not None
            self._on_unsent(job, executor, error)
        self._wake()

    def _on_unsent(self, job: Job, executor: ServiceExecutor, error: BaseException) -> None:
        """Send a task again that did not get out, unless that is its own fault."""
        from fabric.compute.client import translate

        # The SDK cancels what had not come to be sent when another submit failed.
        innocent = isinstance(error, CancelledError)
        reason = translate(error)
        with self._lock:
            if self._executor is executor:
                self._executor = None
            if job not in self._open:
                return
            again = innocent or isinstance(reason, ServiceUnreachable | ServiceBusy)
            if not again and self._wave_size > 1 and not isinstance(reason, AuthError):
                again = job.alone = True
            if again:
                job.inner = None
                self._wave = [other for other in self._wave if other is not job]
                self._waiting.appendleft(job)
                if not innocent:
                    self._back_off(reason)
        if not again:
            self._settle(job, reason)

    def _back_off(self, reason: FabricError) -> None:
        now = time.monotonic()
        if now < self._retry_at or isinstance(reason, ServiceRefused):
            return
        if isinstance(reason, ServiceBusy):
            delay_s = float(str(reason.detail["retry_after_s"]))
            self._pause(delay_s)
        else:
            delay_s = min(MAX_BACKOFF_S, 0.5 * 2**self._num_failures)
        logger.warning("submit failed, again in %.1f s: %s", delay_s, reason.message)
        self._num_failures += 1
        self._retry_at = now + delay_s

    def _settle(
        self, job: Job, error: FabricError | None, inner: ComputeFuture | None = None
    ) -> None:
        with self._lock:
            if job not in self._open:
                self.num_stray_results += inner is not None and not self._closed
                return
            self._open.discard(job)
        if not job.future.running() and not job.future.set_running_or_notify_cancel():
            return
        if error is not None:
            job.future.set_exception(error)
        else:
            assert inner is not None
            job.future.set_result(inner.result())
