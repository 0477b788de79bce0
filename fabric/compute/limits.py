"""What the Globus Compute service and its SDK allow, and the one budget that keeps to it.

Source: the limits page of Globus Compute's documentation (docs/limits.rst in
globus/globus-compute), and the constants of globus-compute-sdk and -endpoint 4.19.
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fabric.errors import ServiceUnreachable, SettingInvalid
from fabric.messages.wire import Wire

MAX_PAUSE_S = 3600.0
"""A pause that another process has written is not believed to be longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """The service's figures, for one identity.

    Several processes of one identity share ``max_requests``: they count in one file
    (``RequestBudget``), or each is given its part.
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


class _Sent(Wire):
    """When requests were sent, oldest first, and until when none may be, in seconds."""

    sent_at: tuple[float, ...] = ()
    paused_until: float = 0.0


class RequestBudget:
    """Lets requests through so that no window ever holds more than the service allows.

    Thread-safe; waiting requests go in turn. One budget stands for one identity; that of several
    processes is a file.

    Args:
        limits: The service's figures.
        shared: A file in which all processes of the identity count; made if missing. ``None``:
            this process counts alone.
    """

    def __init__(self, limits: ServiceLimits, shared: Path | None = None) -> None:
        self._limits = limits
        self._shared = shared
        # Only the wall clock is the same for all who read a file.
        self._clock = time.monotonic if shared is None else time.time
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._sent = _Sent()
        self._closed = False
        self.num_requests = 0
        """Requests that this process was let through with so far."""

    def acquire(self) -> None:
        """Block until one more request may be sent.

        Raises:
            ServiceUnreachable: The budget was closed.
            SettingInvalid: The file cannot be read or written.
        """
        with self._turn, self._changed:
            while not self._closed and (wait_s := self._try()) > 0:
                self._changed.wait(wait_s)
            if self._closed:
                raise ServiceUnreachable(reason="this process is closing its connection to it")
            self.num_requests += 1

    def pause(self, seconds: float) -> None:
        """Let nothing through for ``seconds``: the service said so."""
        # Where the file cannot be written, acquire says so.
        with self._changed, suppress(SettingInvalid), self._opened():
            until = max(self._sent.paused_until, self._clock() + seconds)
            self._sent = self._sent.model_copy(update={"paused_until": until})
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait; nothing is let through any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _try(self) -> float:
        """Count one more request and return 0, or return in how many seconds to try again."""
        window_s = self._limits.window_s + self._limits.margin_s
        with self._opened():
            now = self._clock()
            # A clock that was set back leaves times that are still to come.
            sent_at = tuple(at for at in self._sent.sent_at if now - window_s < at <= now)
            wait_s = self._sent.paused_until - now
            if len(sent_at) >= self._limits.max_requests:
                wait_s = max(wait_s, sent_at[-self._limits.max_requests] + window_s - now)
            if wait_s <= 0:
                sent_at += (now,)
            self._sent = self._sent.model_copy(update={"sent_at": sent_at})
        return max(0.0, wait_s)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Have in ``_sent`` what all have sent, alone, and keep what becomes of it."""
        if self._shared is None:
            yield
            return
        try:
            with self._shared.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                self._sent = self._read(file.read())
                yield
                file.truncate(0)
                file.write(self._sent.model_dump_json())
        except OSError as error:
            reason = (
                f"it cannot be read and written ({error.strerror}); mend that or choose another"
            )
            raise SettingInvalid(
                setting="state_dir", value=str(self._shared), reason=reason
            ) from error

    def _read(self, text: str) -> _Sent:
        """Return what a file says; one whose writer was killed says nothing."""
        try:
            sent = _Sent.model_validate_json(text)
        except ValidationError:
            return _Sent()
        if sent.paused_until > self._clock() + MAX_PAUSE_S:
            return _Sent(sent_at=sent.sent_at)
        return sent
