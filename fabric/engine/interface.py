"""What an engine is to the instance around it. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from fabric.errors import FabricError
from fabric.messages import Event, Limits, Load, PointManifest, Task

EventSink = Callable[[Event], None]
"""Takes the events of one task in order. Called on the engine's thread; must not block."""

FetchAdapter = Callable[[str], bytes]
"""Returns an adapter's file (``fabric.payloads.lora``) by its digest; may block.

Raises ``AdapterUnavailable`` where that is not possible.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a loaded engine says of itself; ``digest`` is of the model's tensors, ``points`` where
    programs may act."""

    model: str
    digest: str
    limits: Limits
    dtype: str
    engine: str
    points: PointManifest | None = None


class Engine(Protocol):
    """One loaded model that runs many tasks in one continuous batch.

    Thread-safe: the instance calls from its event loop, the engine works on a thread of its own.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Known after ``start``."""

    @property
    def failure(self) -> Future[FabricError]:
        """Done when the engine has ended by itself, with the reason; its tasks fail then."""

    def start(self) -> None:
        """Load the model and start the engine's thread.

        Raises:
            ModelNotLoadable: The files are missing or of a kind that cannot be served.
            DigestMismatch: The tensors are not those that were asked for.
            RankLost: A process that should hold part of the model ended meanwhile.
        """

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task and return at once.

        The sink gets ``Accepted``, then ``PromptScored`` if asked for, ``Token`` events (or, of the
        mode ``embed``, one ``Embedding``; of the mode ``program``, ``Saves`` too), and at last
        ``Finished``; or ``Failed`` at any point, after which nothing follows. Bad input ends the
        task with ``Failed`` (code ``context_length_exceeded``, ``invalid_parameter``, …) and never
        raises. A task whose ``deadline_s`` passes fails with ``deadline_exceeded``.
        """

    def cancel(self, task_id: str, attempt: int) -> None:
        """Free the task's rows within one step; its sink gets ``Failed(request_cancelled)`` with
        the usage so far. Unknown tasks are ignored."""

    def load(self) -> Load:
        """Return how busy the engine is."""

    def close(self) -> None:
        """Stop the thread and free the model; tasks still there fail with ``engine_stopped``.
        Calling it twice is harmless."""
