"""The SDK's Executor as the pool uses it, its end, and what its errors mean.

Importing this module imports the SDK (a second); others import it only when they need one.
"""

from __future__ import annotations

import re
from uuid import UUID

from globus_compute_sdk import Executor
from globus_compute_sdk.errors import TaskExecutionFailed
from globus_compute_sdk.sdk.asynchronous.compute_future import ComputeFuture
from globus_compute_sdk.sdk.executor import _RESULT_WATCHERS

from fabric.compute.client import RESULT_SERIALIZERS, ServiceClient
from fabric.compute.limits import ServiceLimits
from fabric.compute.target import JSON, ComputeTarget
from fabric.errors import FabricError, PayloadTooLarge, TaskFailed, TaskLost

MAX_REASON_CHARS = 600

LOST_WORKER = re.compile(r"\b(WorkerLost|ManagerLost|InterchangeError|BrokenProcessPool)\b")
"""How the endpoint's engine says that a worker went with the task it had."""
TOO_LARGE = re.compile(r"MaxResultSizeExceeded\((\d+), (\d+)\)")
"""What the endpoint's engine says of a result that it does not take: its size, and the cap."""


class ServiceExecutor(Executor):
    """An Executor for one target, which leaves the other Executors of its process alone.

    Args:
        client: What it sends with.
        target: Where its tasks go.
        limits: The service's figures.
        task_group_id: The group that an earlier one for this target used, whose results one thread
            waits for; ``None`` lets the service make one.
    """

    def __init__(
        self,
        client: ServiceClient,
        target: ComputeTarget,
        limits: ServiceLimits,
        task_group_id: UUID | None,
    ) -> None:
        super().__init__(
            endpoint_id=target.endpoint_id,
            client=client,
            user_endpoint_config=dict(target.config) or None,
            result_serializers=RESULT_SERIALIZERS,
            batch_size=limits.tasks_per_request,
            # The SDK counts submits of fewer tasks than this: with 1, none, and the budget decides.
            api_burst_limit=1,
        )
        self.task_group_id = task_group_id

    @property
    def task_group_id(self) -> UUID | None:
        """The group of its tasks.

        The SDK's own property makes the group that was used last that of every new Executor of the
        process, whoever it belongs to; and with it goes the client that reads the results.
        """
        return self._task_group_id

    @task_group_id.setter
    def task_group_id(self, value: UUID | str | None) -> None:
        self._task_group_id = UUID(value) if isinstance(value, str) else value

    def send(self, function_id: UUID, args: tuple[JSON, ...]) -> ComputeFuture:
        """Submit a task.

        Raises:
            RuntimeError: The Executor has ended.
        """
        future: ComputeFuture = self.submit_to_registered_function(str(function_id), tuple(args))
        return future

    def stop(self) -> None:
        """Take no more tasks, drop what has not been sent, and return at once."""
        self.shutdown(wait=False, cancel_futures=True)  # type: ignore[no-untyped-call]


def explain(error: BaseException, task_id: str | None) -> FabricError:
    """Return our error for a task that was sent and has no result."""
    if not isinstance(error, TaskExecutionFailed):
        return TaskLost(task_id=task_id, reason=str(error) or type(error).__name__)
    text = error.remote_data.strip()
    if found := TOO_LARGE.search(text):
        return PayloadTooLarge(
            size_bytes=int(found[1]),
            cap_bytes=int(found[2]),
            remedy="ask for less at once, or give the site a payload store",
        )
    reason = _get_reason(text)
    if LOST_WORKER.search(text):
        return TaskLost(task_id=task_id, reason=reason)
    return TaskFailed(reason=reason)


def _get_reason(text: str) -> str:
    """Return what an endpoint's text says in the end: of a traceback, only the exception."""
    _, frame, after = text.rpartition('\n  File "')
    lines = after.splitlines()[1:] if frame else []
    while lines and lines[0].startswith(" "):
        del lines[0]
    reason = " ".join(" ".join(lines).split() or text.split())
    return reason[:MAX_REASON_CHARS].rstrip(".") or "it does not say why"


def end_result_watcher(task_group_id: UUID, timeout_s: float) -> None:
    """End the thread that waits for a group's results, and close what it had open.

    The SDK ends it at exit only, and then waits for every open task, however long it runs. It has
    no public way to it.
    """
    watcher = _RESULT_WATCHERS.get(task_group_id)
    if watcher is None:
        return
    connection = watcher._connection
    watcher.shutdown(wait=False, cancel_futures=True)  # type: ignore[no-untyped-call]
    watcher.join(timeout_s)
    if connection is not None and not watcher.is_alive():
        connection.ioloop.close()
