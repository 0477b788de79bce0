"""Which tasks a relay carries together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fabric.messages import Event, Limits, ProgramInput, Task

if TYPE_CHECKING:
    from fabric.dispatch.relay import RelayFigures

TOKEN_EVENT_BYTES = 200
"""A token event as JSON, without alternatives."""
ALTERNATIVE_BYTES = 80
"""One alternative of a token, or its log probability."""
ROUNDS = 4
"""So often a batch may fill the instance's rows: what ends first waits for what ends last."""


class Entry:
    """A task on a channel, from its caller's call to its outcome."""

    __slots__ = ("alone", "answer_bytes", "deadline_at", "outcome", "sent", "size_bytes", "task")

    def __init__(self, task: Task, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self.task = task
        self.deadline_at = loop.time() + task.deadline_s
        self.outcome: asyncio.Future[Sequence[Event]] = loop.create_future()
        self.sent = False
        self.alone = False
        """Whether it is sent by itself, after a batch whose answer was too large."""
        self.size_bytes = len(task.model_dump_json())
        self.answer_bytes = get_answer_bytes(task, limits)

    @property
    def length_class(self) -> int:
        """Tasks of one class are within a factor of four of each other's expected length."""
        return self.answer_bytes.bit_length() // 2

    def get_task(self, now: float) -> Task:
        """Return the task with the time that is left of its deadline."""
        left_s = max(0.001, self.deadline_at - now)
        return self.task.model_copy(update={"deadline_s": left_s})

    def finish(self, events: Sequence[Event]) -> bool:
        """Give the caller its events; return whether it still waited."""
        if self.outcome.done():
            return False
        self.outcome.set_result(events)
        return True

    def fail(self, error: Exception) -> None:
        """End the caller's wait with an error, if it still waits."""
        if not self.outcome.done():
            self.outcome.set_exception(error)
            # A caller that left in this very moment never looks at it.
            self.outcome.exception()


class Waiting:
    """Tasks that no batch has taken yet, in the order they came.

    Args:
        figures: How large a batch may be.
        limits: What the instance takes.
    """

    def __init__(self, figures: RelayFigures, limits: Limits) -> None:
        self._figures = figures
        self._max_tasks = min(figures.max_tasks, ROUNDS * limits.max_rows)
        self._entries: list[Entry] = []

    def append(self, entry: Entry) -> None:
        """Queue a task."""
        self._entries.append(entry)

    def separate(self, entries: Sequence[Entry]) -> None:
        """Queue tasks again, before all others, each to be sent by itself."""
        for entry in entries:
            entry.sent = False
            entry.alone = True
        self._entries[:0] = entries

    def take(self, below: int | None = None) -> list[Entry]:
        """Return the next batch: the task that has waited longest, and those that go with it.

        Args:
            below: Only tasks of a smaller length class.
        """
        figures = self._figures
        batch: list[Entry] = []
        left: list[Entry] = []
        size_bytes = answer_bytes = 0
        for entry in self._entries:
            if entry.outcome.done():
                continue
            if below is not None and entry.length_class >= below:
                left.append(entry)
                continue
            fits = not batch or (
                len(batch) < self._max_tasks
                and size_bytes + entry.size_bytes <= figures.max_bytes
                and answer_bytes + entry.answer_bytes <= figures.max_answer_bytes
                and entry.length_class == batch[0].length_class
                and not (entry.alone or batch[0].alone)
            )
            if fits:
                entry.sent = True
                size_bytes += entry.size_bytes
                answer_bytes += entry.answer_bytes
                batch.append(entry)
            else:
                left.append(entry)
        self._entries = left
        return batch


def get_answer_bytes(task: Task, limits: Limits) -> int:
    """Return about how many bytes a task's events take as JSON, if it runs to its end."""
    if isinstance(asked := task.request.input, ProgramInput):
        return asked.program.limits.result_bytes * 4 // 3
    sampling = task.request.sampling
    tokens = limits.context_tokens if sampling.max_tokens is None else sampling.max_tokens
    alternatives = 0 if sampling.logprobs is None else 1 + sampling.logprobs
    each = TOKEN_EVENT_BYTES + alternatives * ALTERNATIVE_BYTES
    total = min(tokens, limits.context_tokens) * sampling.n * each
    if sampling.prompt_logprobs:
        total += min(task.request.prompt_tokens_bound(), limits.context_tokens) * each
    return total
