"""What the service knows of endpoints, asked seldom and shared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fabric.errors import ServiceBusy

if TYPE_CHECKING:
    from fabric.compute.client import ServiceClient

FRESH_S = 5.0
"""An answer is good for so long; endpoints report less often than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStatus:
    """Whether an endpoint's agent has been heard of lately, and what it last reported."""

    online: bool
    detail: Mapping[str, Any] = field(default_factory=dict)


class StatusBoard:
    """Answers from memory while an answer is fresh; one question at a time goes out.

    Args:
        client: Asks; nobody else uses it.
        pause: Called with the seconds in which the service wants nothing of this identity.
        fresh_s: How long an answer is good for.
    """

    def __init__(
        self, client: ServiceClient, pause: Callable[[float], None], *, fresh_s: float = FRESH_S
    ) -> None:
        self._client = client
        self._pause = pause
        self._fresh_s = fresh_s
        self._lock = threading.Lock()
        self._known: dict[UUID, tuple[float, EndpointStatus]] = {}

    def status(self, endpoint_id: UUID) -> EndpointStatus:
        """Return an endpoint's status; see ``ComputePool.status``."""
        from fabric.compute.client import service_errors

        with self._lock:
            known = self._known.get(endpoint_id)
            if known is not None and time.monotonic() < known[0] + self._fresh_s:
                return known[1]
            try:
                with service_errors():
                    answer = self._client.get_endpoint_status(endpoint_id)
            except ServiceBusy as busy:
                self._pause(float(str(busy.detail["retry_after_s"])))
                raise
            status = EndpointStatus(
                online=answer.get("status") == "online", detail=answer.get("details") or {}
            )
            self._known[endpoint_id] = (time.monotonic(), status)
            return status
