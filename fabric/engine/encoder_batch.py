"""Texts through an encoder: those that wait go together, padded to the longest of them.

Nothing is kept between steps, so there is no cache and nothing to preempt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from logging import getLogger

from torch import Tensor

from fabric.engine.batch import tell
from fabric.engine.config import EngineConfig
from fabric.engine.encoder import Encoder
from fabric.engine.interface import EventSink
from fabric.engine.pooling import pack_normalised
from fabric.engine.reports import Reports
from fabric.errors import (
    DeadlineExceeded,
    DigestMismatch,
    FabricError,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import Accepted, Embedding, Failed, Finished, Load, Task, Usage

_logger = getLogger(__name__)

Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    task: Task
    sink: EventSink
    ids: list[int]
    received_at: float


class EncoderBatch:
    """All texts of an engine. Not thread-safe: everything happens on the engine's thread.

    Args:
        encoder: The model.
        config: Row and step limits; ``step_tokens`` counts padding too.
    """

    def __init__(self, encoder: Encoder, config: EngineConfig) -> None:
        self._encoder = encoder
        self._config = config
        self._jobs: dict[Key, _Job] = {}
        """In the order they came."""
        self._busy_s = 0.0
        self._tokens_per_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is a text to step for."""
        return bool(self._jobs)

    def load(self) -> Load:
        """Return how busy the batch is."""
        num_running = min(len(self._jobs), self._config.max_rows)
        return Load(
            num_running=num_running,
            num_waiting=len(self._jobs) - num_running,
            prefill_tokens_per_s=self._tokens_per_s,
            busy_s=self._busy_s,
        )

    def add(self, task: Task, sink: EventSink, *, received_at: float) -> None:
        """Tokenize a task's text and queue it; what is wrong with it goes to its sink."""
        key, digest = (task.id, task.attempt), self._encoder.digest
        try:
            if key in self._jobs:
                raise RequestInvalid(
                    param="attempt", value=task.attempt, reason="this attempt is running already"
                )
            if task.digest != digest:
                raise DigestMismatch(name=task.request.model, expected=task.digest, actual=digest)
            ids = self._encoder.tokenize(task.request)
        except FabricError as error:
            tell(sink, Reports.failed(task, error))
            return
        accepted = Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=len(ids))
        if tell(sink, accepted):
            self._jobs[key] = _Job(task=task, sink=sink, ids=ids, received_at=received_at)

    def cancel(self, task_id: str, attempt: int) -> None:
        """End a task whose caller wants no more of it; unknown ones are ignored."""
        if job := self._jobs.get((task_id, attempt)):
            self._end(job, Reports.failed(job.task, RequestCancelled()))

    def fail_all(self, error: FabricError) -> None:
        """End every task with ``error``."""
        for job in list(self._jobs.values()):
            self._end(job, Reports.failed(job.task, error))

    def step(self) -> None:
        """Embed the texts that came first. Errors end their own task, or those of the step."""
        self._drop_overdue()
        jobs = self._take()
        if not jobs:
            return
        began_at = time.monotonic()
        try:
            vectors_BH = self._encoder.embed([(job.ids, job.task.request.pooling) for job in jobs])
        except Exception as error:
            _logger.exception("a step failed", extra={"num_runs": len(jobs)})
            failure = RowFailed(reason=f"{type(error).__name__}: {error}")
            for job in jobs:
                self._end(job, Reports.failed(job.task, failure))
            return
        seconds = time.monotonic() - began_at
        num_tokens = sum(len(job.ids) for job in jobs)
        self._busy_s += seconds
        self._tokens_per_s = num_tokens / max(seconds, 1e-6)
        for job, vector_H in zip(jobs, vectors_BH, strict=True):
            usage = Usage(
                prompt_tokens=len(job.ids),
                queue_s=max(0.0, began_at - job.received_at),
                device_s=seconds * len(job.ids) / num_tokens,
            )
            self._deliver(job, vector_H, usage)

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        for job in list(self._jobs.values()):
            task = job.task
            if now - job.received_at >= task.deadline_s:
                error = DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt)
                self._end(job, Reports.failed(task, error))

    def _take(self) -> list[_Job]:
        """Return the texts of the next step, first come first served."""
        jobs: list[_Job] = []
        longest = 0
        for job in self._jobs.values():
            longest = max(longest, len(job.ids))
            too_many = longest * (len(jobs) + 1) > self._config.step_tokens
            if jobs and (too_many or len(jobs) == self._config.max_rows):
                break
            jobs.append(job)
        return jobs

    def _deliver(self, job: _Job, vector_H: Tensor, usage: Usage) -> None:
        task = job.task
        try:
            data = pack_normalised(vector_H)
        except FabricError as error:
            self._end(job, Reports.failed(task, error, usage))
            return
        tell(job.sink, Embedding(task_id=task.id, attempt=task.attempt, data=data))
        self._end(
            job,
            Finished(task_id=task.id, attempt=task.attempt, finish_reasons=("stop",), usage=usage),
        )

    def _end(self, job: _Job, event: Finished | Failed) -> None:
        del self._jobs[job.task.id, job.task.attempt]
        tell(job.sink, event)
