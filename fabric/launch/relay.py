"""A blocking session with an instance's direct route, for workers of Parsl and Globus Compute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from fabric.errors import FabricError, ProtocolViolation, SessionLost, SessionRefused
from fabric.messages import (
    Accepted,
    Embedding,
    Failed,
    Failure,
    Finished,
    Goodbye,
    Hello,
    PromptScored,
    Saves,
    Task,
    Token,
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

PROTOCOL_ERROR = 1002
"""The WebSocket code an instance closes with when it refuses what it was sent."""


@contextmanager
def open_session(direct_url: str, token: str) -> Iterator[RelaySession]:
    """Yield a welcomed session; whatever breaks it is raised as ``ConnectionError``.

    Raises:
        ConnectionError: The instance cannot be reached, went away or is too slow.
        SessionRefused: The token is not the instance's.
    """
    try:
        with connect(
            direct_url,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=MAX_FRAME_BYTES,
            open_timeout=CONNECT_TIMEOUT_S,
            close_timeout=1.0,
            proxy=None,
        ) as websocket:
            yield RelaySession(websocket)
    except InvalidStatus as error:
        reason = f"{direct_url} answered {error.response.status_code}"
        raise SessionRefused(reason=reason) from None
    except (OSError, WebSocketException) as error:
        # Exceptions of the library do not survive the way back through pickle.
        raise ConnectionError(f"{direct_url}: {error}") from None


class RelaySession:
    """One session; ``hello`` is what the instance said first, as JSON."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self._lines: deque[str] = deque()
        self.hello = self.receive(timeout_s=CONNECT_TIMEOUT_S)
        # Heartbeats are of no use to a relay, whose worker is watched.
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

    def describe(self) -> list[str]:
        """Return the ``Hello`` and the first ``Heartbeat``, as JSON; call it before ``run``.

        Raises:
            TimeoutError: There was no heartbeat in time.
        """
        return [self.hello, self.receive(timeout_s=CONNECT_TIMEOUT_S)]

    def run(self, tasks: Sequence[Task]) -> list[list[str]]:
        """Run tasks at once and return the events of each, as JSON, in the order of the tasks.

        What is finished is never lost with the rest: when the instance leaves, or outlasts a
        deadline, the events of the tasks it still had end with ``Failed(session_lost)``; when it
        refuses to go on, with ``Failed(protocol_violation)``.
        """
        unlimited = [task.model_copy(update={"window": UNLIMITED_EVENTS}) for task in tasks]
        lines = [task.model_dump_json() for task in unlimited]
        return self.deliver(lines, [(task.id, task.attempt, task.deadline_s) for task in tasks])

    def deliver(
        self, tasks_json: Sequence[str], keys: Sequence[tuple[str, int, float]]
    ) -> list[list[str]]:
        """As ``run``, with tasks as JSON that only the instance reads.

        Args:
            tasks_json: The tasks.
            keys: The id, the attempt and the deadline (seconds) of each.
        """
        batch = _Batch(keys)
        failure: FabricError | None = None
        try:
            for task_json in tasks_json:
                self.send(task_json)
            while batch.open and failure is None:
                failure = self._lost(batch.take(self.receive(timeout_s=batch.left_s())))
        except TimeoutError:
            failure = self._lost("it has not answered by the deadline")
        except ConnectionClosed as error:
            failure = self._lost(str(error))
            if error.rcvd is not None and error.rcvd.code == PROTOCOL_ERROR:
                failure = FabricError.rebuild(ProtocolViolation.code, error.rcvd.reason, {})
        return batch.close(failure)

    def _lost(self, reason: str | None) -> SessionLost | None:
        if reason is None:
            return None
        hello = parse_from_instance(self.hello)
        instance = hello.instance if isinstance(hello, Hello) else ""
        return SessionLost(instance=instance, reason=reason)


class _Batch:
    """The events of several tasks; ``open`` are those that have not ended, and until when."""

    def __init__(self, keys: Sequence[tuple[str, int, float]]) -> None:
        now = time.monotonic()
        self._keys = [(task_id, attempt) for task_id, attempt, _ in keys]
        self._events: Mapping[tuple[str, int], list[str]] = {key: [] for key in self._keys}
        self.open = {
            (task_id, attempt): now + deadline_s + DEADLINE_GRACE_S
            for task_id, attempt, deadline_s in keys
        }

    def left_s(self) -> float:
        """Return the seconds until the last open task must have ended."""
        return max(0.0, max(self.open.values()) - time.monotonic())

    def take(self, line: str) -> str | None:
        """Take a frame; return why there will be no more, if it says so."""
        frame = parse_from_instance(line)
        match frame:
            case Goodbye():
                return f"it has left: {frame.reason}"
            case (
                Accepted()
                | PromptScored()
                | Token()
                | Embedding()
                | Saves()
                | Finished()
                | Failed()
            ):
                key = (frame.task_id, frame.attempt)
                if key in self._events:
                    self._events[key].append(line)
                if isinstance(frame, Finished | Failed):
                    self.open.pop(key, None)
        return None

    def close(self, error: FabricError | None) -> list[list[str]]:
        """Fail what is still open, and return all events."""
        if error is not None:
            failure = Failure.of(error)
            for task_id, attempt in self.open:
                failed = Failed(task_id=task_id, attempt=attempt, failure=failure)
                self._events[task_id, attempt].append(failed.model_dump_json())
        return [self._events[key] for key in self._keys]
