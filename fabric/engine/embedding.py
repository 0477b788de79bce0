"""The engine of sentence-embedding models: encoders, which the continuous batch does not serve.

Texts that wait go through the model together, padded to the longest of them; nothing is kept
between steps, so there is no cache.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from logging import getLogger

import torch
import transformers

from fabric import __version__
from fabric.engine.batch import tell
from fabric.engine.config import EngineConfig
from fabric.engine.encoder import Encoder
from fabric.engine.interface import EngineInfo, EventSink
from fabric.engine.pooling import pack_normalised
from fabric.engine.reports import Reports
from fabric.engine.source import ModelSource
from fabric.errors import (
    DeadlineExceeded,
    DigestMismatch,
    EngineStopped,
    FabricError,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import Accepted, Embedding, Failed, Finished, Limits, Load, Task, Usage

_logger = getLogger(__name__)

Key = tuple[str, int]


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """One text. Only ``cancelled`` is written outside the engine's thread."""

    task: Task
    sink: EventSink
    received_at: float
    ids: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def key(self) -> Key:
        return self.task.id, self.task.attempt

    @property
    def verdict(self) -> FabricError | None:
        """Why nobody waits for it any more, if so."""
        if self.cancelled:
            return RequestCancelled()
        if time.monotonic() - self.received_at >= self.task.deadline_s:
            return DeadlineExceeded(deadline_s=self.task.deadline_s, attempts=self.task.attempt)
        return None


class EmbeddingEngine:
    """An ``Engine`` that only embeds, over a sentence-transformers directory, on the CPU.

    Args:
        source: Where the model's files are.
        config: Limits and choices; ``step_tokens`` counts padding too.
        name: What the instance calls the model.
        expected_digest: Of the tensors in the configured dtype; ``None`` takes any.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        name: str,
        expected_digest: str | None = None,
    ) -> None:
        self._source = source
        self._config = config
        self._name = name
        self._expected_digest = expected_digest
        self._changed = threading.Condition()
        self._arrived: deque[_Job] = deque()
        self._open: dict[Key, _Job] = {}
        """Every task whose end has not been told."""
        self._num_running = 0
        self._closed: EngineStopped | None = EngineStopped(reason="its engine has not started")
        self._thread: threading.Thread | None = None
        self._info: EngineInfo | None = None
        self._busy_s = 0.0
        self._tokens_per_s = 0.0

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Known after ``start``."""
        assert self._info is not None, "the engine has not been started"
        return self._info

    def start(self) -> None:
        """Load the model and start the engine's thread; see ``Engine.start``."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"engine {self._name}", daemon=True
        )
        self._thread.start()
        ready.result()

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task and return at once; see ``Engine.submit``."""
        job = _Job(task=task, sink=sink, received_at=time.monotonic())
        refusal: FabricError | None
        with self._changed:
            if (refusal := self._closed) is None and job.key in self._open:
                refusal = RequestInvalid(
                    param="attempt", value=task.attempt, reason="this attempt is running already"
                )
            if refusal is None:
                self._open[job.key] = job
                self._arrived.append(job)
                self._changed.notify()
        if refusal is not None:
            tell(sink, Reports.failed(task, refusal))

    def cancel(self, task_id: str, attempt: int) -> None:
        """End a task before or after the step that runs; unknown tasks are ignored."""
        with self._changed:
            if (job := self._open.get((task_id, attempt))) is not None:
                job.cancelled = True

    def load(self) -> Load:
        """Return how busy the engine is."""
        with self._changed:
            return Load(
                num_running=self._num_running,
                num_waiting=max(0, len(self._open) - self._num_running),
                prefill_tokens_per_s=self._tokens_per_s,
                busy_s=self._busy_s,
            )

    def close(self) -> None:
        """Stop the thread and free the model. Calling it twice is harmless."""
        with self._changed:
            if self._closed is None:
                self._closed = EngineStopped(reason="its engine is stopping")
            self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # ---- the engine's thread ------------------------------------------------------------------

    def _run(self, ready: Future[None]) -> None:
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        try:
            encoder = self._build()
        except BaseException as error:
            ready.set_exception(error)
            return
        self._closed = None
        ready.set_result(None)
        try:
            self._serve(encoder)
        except BaseException:  # a panic of the tokenizer's is not an Exception
            _logger.exception("the engine's thread failed", extra={"model": self._name})
            with self._changed:
                self._closed = EngineStopped(reason="its engine failed")
        finally:
            self._stop()

    def _build(self) -> Encoder:
        config = self._config
        encoder = Encoder(
            self._source,
            name=self._name,
            dtype=config.dtype,
            expected_digest=self._expected_digest,
            context_tokens=config.context_tokens,
        )
        self._info = EngineInfo(
            model=self._name,
            digest=encoder.digest,
            limits=Limits(
                context_tokens=encoder.context_tokens,
                max_rows=config.max_rows,
                cache_tokens=encoder.context_tokens * config.max_rows,
                modes=("embed",),
            ),
            dtype=config.dtype,
            engine=f"fabric {__version__} (torch {torch.__version__},"
            f" transformers {transformers.__version__})",
        )
        return encoder

    def _serve(self, encoder: Encoder) -> None:
        ready: deque[_Job] = deque()
        while True:
            with self._changed:
                while not (self._arrived or ready or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                arrived, self._arrived = self._arrived, deque()
            ready += [job for job in arrived if self._admit(encoder, job)]
            if jobs := self._take(ready):
                self._step(encoder, jobs)

    def _admit(self, encoder: Encoder, job: _Job) -> bool:
        task = job.task
        try:
            if task.digest != encoder.digest:
                raise DigestMismatch(
                    name=task.request.model, expected=task.digest, actual=encoder.digest
                )
            job.ids = encoder.tokenize(task.request)
        except FabricError as error:
            self._end(job, Reports.failed(task, error))
            return False
        tell(
            job.sink,
            Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=len(job.ids)),
        )
        return True

    def _take(self, ready: deque[_Job]) -> list[_Job]:
        """Return the texts of the next step, first come first served."""
        jobs: list[_Job] = []
        longest = 0
        while ready and len(jobs) < self._config.max_rows:
            longest = max(longest, len(ready[0].ids))
            if jobs and longest * (len(jobs) + 1) > self._config.step_tokens:
                break
            job = ready.popleft()
            if (error := job.verdict) is None:
                jobs.append(job)
            else:
                self._end(job, Reports.failed(job.task, error))
        return jobs

    def _step(self, encoder: Encoder, jobs: Sequence[_Job]) -> None:
        self._num_running = len(jobs)
        began_at = time.monotonic()
        try:
            vectors_BH = encoder.embed([(job.ids, job.task.request.pooling) for job in jobs])
        except Exception as error:
            _logger.exception("a step failed", extra={"num_runs": len(jobs)})
            failure = RowFailed(reason=f"{type(error).__name__}: {error}")
            for job in jobs:
                self._end(job, Reports.failed(job.task, failure))
            return
        finally:
            self._num_running = 0
        seconds = time.monotonic() - began_at
        num_tokens = sum(len(job.ids) for job in jobs)
        self._busy_s += seconds
        self._tokens_per_s = num_tokens / max(seconds, 1e-6)
        for job, vector_H in zip(jobs, vectors_BH, strict=True):
            usage = Usage(
                prompt_tokens=len(job.ids),
                queue_s=began_at - job.received_at,
                device_s=seconds * len(job.ids) / num_tokens,
            )
            self._deliver(job, vector_H, usage)

    def _deliver(self, job: _Job, vector_H: torch.Tensor, usage: Usage) -> None:
        task = job.task
        try:
            if (error := job.verdict) is not None:
                raise error
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
        with self._changed:
            del self._open[job.key]
        tell(job.sink, event)

    def _stop(self) -> None:
        with self._changed:
            assert self._closed is not None
            closed, jobs = self._closed, list(self._open.values())
        for job in jobs:
            self._end(job, Reports.failed(job.task, closed))
