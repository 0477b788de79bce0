"""What the Globus Compute service, or a task sent through it, does not allow or did not do."""

from __future__ import annotations

from fabric.errors.auth import AuthError
from fabric.errors.routing import DispatchError


class CredentialsRefused(AuthError):
    """Globus does not accept our own credentials, also after a refresh."""

    code = "credentials_refused"

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"Globus refused this client's credentials ({reason}); log in again with `fabric"
            " login`, or check the client's id and secret.",
            reason=reason,
        )


class ServiceUnreachable(DispatchError):
    """The Globus Compute service did not answer."""

    code = "service_unreachable"
    http_status = 503

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The Globus Compute service does not answer ({reason}); tasks that were sent go on."
            " Try again later, or use another site.",
            reason=reason,
        )


class ServiceBusy(DispatchError):
    """The service answered 429: this identity sends more than it may."""

    code = "service_busy"
    http_status = 429

    def __init__(self, *, retry_after_s: float) -> None:
        super().__init__(
            "The Globus Compute service asks this identity to send less; another process with the"
            f" same credentials may be using up its share. Try again in {retry_after_s:g} s.",
            retry_after_s=retry_after_s,
        )


class ServiceRefused(DispatchError):
    """The service does not do what was asked, and says why."""

    code = "service_refused"
    http_status = 502
    retryable = False

    def __init__(self, *, status: int, reason_code: str, reason: str) -> None:
        super().__init__(
            f"The Globus Compute service refused with {status} {reason_code}: {reason.rstrip('.')}."
            " Check the endpoint's id, its allowed functions and who may use it.",
            status=status,
            reason_code=reason_code,
            reason=reason,
        )


class EndpointOffline(DispatchError):
    """The endpoint's agent has not been heard of lately; what it was sent waits for it."""

    code = "endpoint_offline"
    http_status = 503

    def __init__(self, *, endpoint: str, machine: str) -> None:
        super().__init__(
            f"The endpoint {endpoint} of {machine} is offline. Jobs there go on without it; start"
            " it again at the login node with `globus-compute-endpoint start`, and it is asked"
            " again.",
            endpoint=endpoint,
            machine=machine,
        )


class TaskLost(DispatchError):
    """A task was sent and its result will not come; it may or may not have run."""

    code = "task_lost"

    def __init__(self, *, reason: str, task_id: str | None = None) -> None:
        super().__init__(
            f"The result of the Globus Compute task {task_id} is lost: {reason}. It may have run;"
            " it may be sent again.",
            task_id=task_id,
            reason=reason,
        )


class TaskTimedOut(DispatchError):
    """A task had no result in the time it was given."""

    code = "task_timed_out"
    http_status = 504

    def __init__(self, *, timeout_s: float, sent: bool) -> None:
        where = "it was sent, and may still run" if sent else "it was never sent"
        super().__init__(
            f"The Globus Compute task had no result after {timeout_s:g} s ({where}); the endpoint"
            " may be offline, or its block may wait in a queue.",
            timeout_s=timeout_s,
            sent=sent,
        )


class TaskFailed(DispatchError):
    """A registered function ended with an error on the endpoint, or could not be started there."""

    code = "task_failed"
    retryable = False

    def __init__(self, *, reason: str) -> None:
        super().__init__(f"The task failed at the endpoint: {reason}.", reason=reason)
