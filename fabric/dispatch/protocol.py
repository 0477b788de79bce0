"""What every channel promises. One contract suite (tests/contract) holds all of them to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from fabric.messages import Event, Hello, Load, Task


class Channel(Protocol):
    """A way to one instance.

    Several tasks may run at once. A channel does no retries and keeps no results: the broker owns
    ids, deadlines, deduplication and redispatch.
    """

    @property
    def hello(self) -> Hello:
        """What the instance said of itself when the channel opened."""

    @property
    def load(self) -> Load:
        """The load the instance last reported."""

    @property
    def streams(self) -> bool:
        """Whether token events arrive while the task runs, rather than all at its end."""

    @property
    def draining(self) -> bool:
        """Whether the instance has said that it takes no new tasks."""

    def run(self, task: Task) -> AsyncIterator[Event]:
        """Send a task and yield its events in order.

        The first event is ``Accepted`` or ``Failed``; the last is ``Finished`` or ``Failed``, each
        exactly once. The next token events are only asked for as the caller takes the earlier ones
        (``task.window``). Closing the iterator early (``aclose``, or cancelling the consumer)
        cancels the task on the instance.

        Raises:
            SessionLost: The instance went away, or the channel is closed; it is not known how far
                the task came.
            ProtocolViolation: The instance sent something that does not belong to this task.
        """

    async def cancel(self, task_id: str, attempt: int) -> None:
        """Ask the instance to end a task, and let its iterator go on: it ends with
        ``Failed(request_cancelled)``, whose usage says what was computed, or with ``Finished`` if
        that was quicker. Unknown tasks are ignored."""

    async def wait_closed(self) -> str:
        """Return the reason once the instance is gone for good on this channel."""

    async def drain(self, reason: str) -> None:
        """Ask the instance to finish its tasks and leave."""

    async def close(self, reason: str = "closed by the hub") -> None:
        """End the channel; running tasks end with ``SessionLost``. Calling it twice is harmless."""
