"""Work beside the engine's steps: on a thread of its own, a slice at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum, auto


class _State(Enum):
    FREE = auto()
    """It computes while steps may run, and touches nothing of theirs."""
    GOING = auto()
    """It computes and the engine's thread waits."""
    PAUSED = auto()
    """It waits for its next slice."""
    OVER = auto()


class Abandoned(BaseException):
    """Nobody wants the work any more; no handler of errors takes it for one."""


class Aside:
    """Work that goes on only while the engine's thread waits for it.

    A thread and no generator, because it pauses in the middle of a forward or a backward pass:
    their frames are torch's, and whether gradients are remembered belongs to a thread.

    Args:
        work: Is called with this. Until its first ``pause`` it must touch nothing that steps use.
    """

    def __init__(self, work: Callable[[Aside], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._state = _State.FREE
        self._until = 0.0
        self._abandoned = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="gradients", daemon=True)

    def go_on(self, seconds: float) -> bool:
        """Let it compute until it pauses, about ``seconds`` from now; return whether it is over.

        Raises:
            Exception: What the work raised.
        """
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._until = time.perf_counter() + seconds
            if self._state is _State.PAUSED:
                self._enter(_State.GOING)
            # What is free goes on beside the steps: nobody need wait until it pauses.
            timeout = seconds if self._state is _State.FREE else None
            self._changed.wait_for(lambda: self._state in (_State.PAUSED, _State.OVER), timeout)
            if self._error is not None:
                raise self._error
            return self._state is _State.OVER

    def abandon(self) -> None:
        """End it at its next pause, and wait for that."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    # For the work itself.

    @property
    def due(self) -> bool:
        """Whether its slice is over."""
        return time.perf_counter() >= self._until

    def pause(self) -> None:
        """Wait for the next slice."""
        with self._changed:
            self._enter(_State.PAUSED)
            self._changed.wait_for(lambda: self._state is _State.GOING or self._abandoned)
            if self._abandoned:
                raise Abandoned

    def _enter(self, state: _State) -> None:
        self._state = state
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._work(self)
        except Abandoned:
            pass
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._enter(_State.OVER)
