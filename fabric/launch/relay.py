"""A blocking session with an instance's direct route, for Parsl workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from fabric.messages import (
    Failed,
    Finished,
    Goodbye,
    Heartbeat,
    Task,
    Welcome,
    new_id,
    parse_from_instance,
)
from fabric.messages.session import MAX_FRAME_BYTES

CONNECT_TIMEOUT_S = 10.0
DEADLINE_GRACE_S = 5.0
"""An instance ends a task at its deadline; if it does not, the relay gives up so much later."""

UNLIMITED_EVENTS = 2**31 - 1
"""All events are returned at once, so there is no reader to wait for."""


@contextmanager
def open_session(direct_url: str, direct_token: str) -> Iterator[RelaySession]:
    """Yield a welcomed session; whatever breaks it is raised as ``ConnectionError``.

    Raises:
        ConnectionError: The instance cannot be reached, went away or is too slow.
    """
    try:
        with connect(
            direct_url,
            additional_headers={"Authorization": f"Bearer {direct_token}"},
            compression=None,
            max_size=MAX_FRAME_BYTES,
            open_timeout=CONNECT_TIMEOUT_S,
            close_timeout=1.0,
            proxy=None,
        ) as websocket:
            yield RelaySession(websocket)
    except (OSError, WebSocketException) as error:
        # Exceptions of the library do not survive the way back through pickle.
        raise ConnectionError(f"{direct_url}: {error}") from None


class RelaySession:
    """One session; ``hello`` is what the instance said first, as JSON."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self._lines: deque[str] = deque()
        self.hello = self.receive(timeout_s=CONNECT_TIMEOUT_S)
        # Heartbeats are of no use to a relay, whose worker Parsl watches.
        welcome = Welcome(session=new_id("relay"), heartbeat_s=3600.0)
        self.send(welcome.model_dump_json())

    def send(self, frame_json: str) -> None:
        """Send one frame."""
        self._websocket.send(frame_json)

    def receive(self, *, timeout_s: float) -> str:
        """Return the next frame.

        Raises:
            TimeoutError: There was none in time.
        """
        while not self._lines:
            self._lines.extend(str(self._websocket.recv(timeout=timeout_s)).split("\n"))
        return self._lines.popleft()

    def run(self, task_json: str) -> list[str]:
        """Run a task and return its events.

        Raises:
            TimeoutError: The instance outlasted the deadline.
            ConnectionError: The instance left before the task's end.
        """
        task = Task.model_validate_json(task_json)
        task = task.model_copy(update={"window": UNLIMITED_EVENTS})
        until = time.monotonic() + task.deadline_s + DEADLINE_GRACE_S
        self.send(task.model_dump_json())
        events: list[str] = []
        while True:
            line = self.receive(timeout_s=max(0.0, until - time.monotonic()))
            frame = parse_from_instance(line)
            if isinstance(frame, Goodbye):
                raise ConnectionError(f"the instance has left: {frame.reason}")
            if not isinstance(frame, Heartbeat):
                events.append(line)
            if isinstance(frame, Finished | Failed):
                return events
