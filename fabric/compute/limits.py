"""What the Globus Compute service and its SDK allow, and the one budget that keeps to it.

Source: the limits page of Globus Compute's documentation (docs/limits.rst in
globus/globus-compute), and the constants of globus-compute-sdk and -endpoint 4.19.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from fabric.errors import ServiceUnreachable


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """The service's figures, for one identity.

    Several processes of one identity share ``max_requests``: give each its part.
    """

    max_requests: int = 20
    """Requests of any kind in any ``window_s``."""
    window_s: float = 10.0
    margin_s: float = 0.5
    """Requests may arrive closer together than they were sent."""
    request_bytes: int = 10_000_000
    """Of all payloads of one submit together, as they travel."""
    result_bytes: int = 10 * 2**20
    """Of one result, as it travels."""
    binary_bytes: int = 7 * 2**20
    """Bytes that still fit a payload or a result once they are encoded as base64."""
    result_life_s: float = 1800.0
    """Results that nobody fetches are kept so long."""
    tasks_per_request: int = 128
    """What the SDK puts in one submit."""
    sdk_burst: int = 4
    sdk_burst_window_s: float = 16.0
    """The SDK's own brake on small submits; ours replaces it."""
    sdk_poll_s: float = 0.5
    """Results are looked at so often, by the SDK and again by the endpoint."""


class RequestBudget:
    """Lets requests through so that no window ever holds more than the service allows.

    Thread-safe; waiting requests go in turn. One budget stands for one identity.
    """

    def __init__(self, limits: ServiceLimits) -> None:
        self._limits = limits
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._sent_at: deque[float] = deque()
        self._paused_until = 0.0
        self._closed = False
        self.num_requests = 0
        """Requests let through so far."""

    def acquire(self) -> None:
        """Block until one more request may be sent.

        Raises:
            ServiceUnreachable: The budget was closed.
        """
        with self._turn, self._changed:
            while (wait_s := self._get_wait_s()) > 0 and not self._closed:
                self._changed.wait(wait_s)
            if self._closed:
                raise ServiceUnreachable(reason="this process is closing its connection to it")
            self._sent_at.append(time.monotonic())
            self.num_requests += 1

    def pause(self, seconds: float) -> None:
        """Let nothing through for ``seconds``: the service said so."""
        with self._changed:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait; nothing is let through any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _get_wait_s(self) -> float:
        now = time.monotonic()
        window_s = self._limits.window_s + self._limits.margin_s
        while self._sent_at and self._sent_at[0] <= now - window_s:
            self._sent_at.popleft()
        wait_s = self._paused_until - now
        if len(self._sent_at) >= self._limits.max_requests:
            wait_s = max(wait_s, self._sent_at[0] + window_s - now)
        return wait_s
