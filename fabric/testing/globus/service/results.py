"""What endpoints send: results, which go on to their users, and heartbeats."""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import UTC, datetime
from uuid import UUID

from globus_compute_common.messagepack import InvalidMessageError, pack, unpack
from globus_compute_common.messagepack.message_types import EPStatusReport, Result
from globus_compute_common.messagepack.message_types.result import ResultErrorDetails

from fabric.testing.globus.service.queues import Outgoing, Queues
from fabric.testing.globus.service.records import Endpoint, Json, Report, Task, UserEndpoint
from fabric.testing.globus.service.settings import PublishedLimits
from fabric.testing.globus.service.store import Store
from fabric.testing.globus.service.submission import Submission

logger = logging.getLogger(__name__)

# A killed user endpoint leaves a pid file; its successor may start once that is three of its
# heartbeats old.
STILL_RUNNING = "Another instance of this endpoint is running"
START_AGAIN_AFTER_S = 4.0
START_ATTEMPTS = 30


class Results:
    """Handles what comes in on the queues of results and heartbeats."""

    def __init__(
        self, store: Store, queues: Queues, submission: Submission, limits: PublishedLimits
    ) -> None:
        self._store = store
        self._queues = queues
        self._submission = submission
        self._limits = limits
        self._start_attempts: dict[str, int] = {}

    def handle(self, body: bytes, key: str, redelivered: bool) -> list[Outgoing]:
        """Take a message that an endpoint sent under its key; return what goes to users."""
        sender = key.partition(".")[0]
        try:
            message = unpack(body)
            if isinstance(message, EPStatusReport):
                return self._handle_report(sender, message)
            if isinstance(message, Result):
                return self._handle_result(sender, message, body, redelivered)
            logger.warning("Endpoint %s sent a %s", sender, type(message).__name__)
        except (InvalidMessageError, ValueError, TypeError) as error:
            logger.warning("Endpoint %s sent what is no message: %s", sender, error)
        return []

    def _handle_result(
        self, sender: str, result: Result, body: bytes, redelivered: bool
    ) -> list[Outgoing]:
        task = self._store.task(str(result.task_id))
        if task is None or task.endpoint != sender:
            logger.warning("Endpoint %s sent a result of %s", sender, result.task_id)
            return []
        if task.outcome is not None:
            # Delivered again because a restart came between noting it and sending it on.
            return [_to_user(task, body)] if redelivered and task.queued else []
        size = len(result.data)
        if size > self._limits.payload_bytes:
            allowed = self._limits.payload_bytes
            reason = f"The result has {size} bytes; at most {allowed} are allowed"
            self._store.add_violation(f"endpoint {sender}: {reason}")
            result = _failure(task.id, "RESULT_TOO_LARGE", reason)
            body = pack(result)
        self._store.put_tasks([task.model_copy(update={"outcome": _outcome(result)})])
        return [_to_user(task, body)] if task.queued else []

    def _handle_report(self, sender: str, report: EPStatusReport) -> list[Outgoing]:
        state: Json = json.loads(json.dumps(report.global_state, default=str))
        error = state.get("error")
        if error is None:
            self._start_attempts.pop(sender, None)
            self._store.put(Report(id=sender, at=time.time(), state=state))
        elif self._store.get(Endpoint, sender) is None:
            return self._handle_failed_start(sender, str(error))
        # Else a failed child of the core agent reports in the name of its parent, which is well.
        return []

    def _handle_failed_start(self, sender: str, error: str) -> list[Outgoing]:
        target = self._store.get(UserEndpoint, sender)
        if target is None:
            return []
        attempt = self._start_attempts.get(sender, 0)
        if STILL_RUNNING in error and attempt < START_ATTEMPTS:
            self._start_attempts[sender] = attempt + 1
            again = threading.Timer(START_AGAIN_AFTER_S, self._start, [target])
            again.daemon = True
            again.start()
            return []
        self._start_attempts.pop(sender, None)
        self._queues.purge(f"{sender}.tasks")
        outgoing = []
        for task in self._store.open_tasks(sender):
            result = _failure(task.id, "ENDPOINT_STARTUP", error)
            outgoing += self._handle_result(sender, result, pack(result), redelivered=False)
        return outgoing

    def _start(self, target: UserEndpoint) -> None:
        if self._store.open_tasks(target.id):
            self._queues.send([self._submission.start_command(target)])


def _failure(task_id: str, code: str, reason: str) -> Result:
    details = ResultErrorDetails(code=code, user_message=reason)
    return Result(task_id=UUID(task_id), data=reason, error_details=details)


def _outcome(result: Result) -> Json:
    transitions = {one.state.value: one.timestamp for one in result.task_statuses or []}
    details = {**(result.details or {}), "task_transitions": transitions}
    return {
        "status": "failed" if result.is_error else "success",
        "exception" if result.is_error else "result": result.data,
        "completion_t": str(datetime.now(UTC).timestamp()),
        "details": json.loads(json.dumps(details, default=str)),
    }


def _to_user(task: Task, body: bytes) -> Outgoing:
    properties = {
        "content_type": "application/octet-stream",
        "timestamp": int(time.time()),
        "headers": {"task_uuid": task.id, "high_assurance": False},
    }
    return Outgoing(exchange="taskgroups", key=task.group, body=body, properties=properties)
