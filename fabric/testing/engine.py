"""An engine that knows no model: it says ``word0 word1 …`` at a fixed pace. Free of torch."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from fabric.engine.interface import EngineInfo, EventSink
from fabric.errors import (
    ContextExceeded,
    DeadlineExceeded,
    EngineStopped,
    FabricError,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import (
    Accepted,
    ChatInput,
    Embedding,
    Failed,
    Failure,
    Finished,
    Limits,
    Load,
    ProgramInput,
    PromptScored,
    Request,
    ScoredToken,
    Task,
    TextInput,
    Token,
    TokensInput,
    TopLogprob,
    Usage,
    pack_floats,
)
from fabric.messages.program import MAX_INLINE_BYTES
from fabric.testing.fixed_programs import FixedProgram, Keep, count_words, get_manifest

FIRST_TOKEN_ID = 1000
LOGPROB = -0.5
DIMENSIONS = 8


def word(position: int) -> str:
    """Return the text of the token at ``position``; the texts of 0, 1, … join to a sentence."""
    return f" word{position}" if position else "word0"


def count_prompt_tokens(request: Request) -> int:
    """Return the tokens this engine sees: one a word, one more a chat message, at least one."""
    match request.input:
        case TokensInput(ids=ids):
            return len(ids)
        case TextInput(text=text):
            return max(1, len(text.split()))
        case ChatInput(messages=messages):
            return sum(1 + len(message.content.split()) for message in messages)
        case ProgramInput(program=program):
            return sum(map(count_words, program.runs))


def embed(request: Request) -> list[float]:
    """Return the vector of a prompt: of length 1, in float32 the same in every process."""
    digest = hashlib.blake2b(request.input.model_dump_json().encode(), digest_size=DIMENSIONS)
    numbers = [byte - 127.5 for byte in digest.digest()]
    return [number / math.hypot(*numbers) for number in numbers]


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """One task in the engine; only ``cancelled`` is written outside the engine's thread."""

    task: Task
    sink: EventSink
    prompt_tokens: int
    end: int
    """The position after the last token."""
    position: int
    submitted_at: float
    started_at: float | None = None
    cancelled: bool = False
    program: FixedProgram | None = None
    hook_bytes_out: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.task.id, self.task.attempt

    @property
    def num_rows(self) -> int:
        if self.program is not None:
            return len(self.program.program.runs)
        return self.task.request.sampling.n


_Action = Callable[[_Job, float], None]


class FixedDelayEngine:
    """An ``Engine`` whose every token takes a known time.

    Token ids are ``FIRST_TOKEN_ID + position``; all choices of a request are equal; ``stop`` is not
    looked for. An embedding, made by ``embed``, takes as long as a first token. A program's runs
    generate side by side, and what they save are zeros (``fixed_programs``).

    Args:
        first_token_s: Seconds from a row's start to its first token.
        token_s: Seconds between the tokens of a row.
        stop_after: A choice ends by itself after so many tokens, unless ``ignore_eos``.
        fail_after: A task fails with ``row_failed`` once it has so many tokens.
        start_error: What ``start`` raises.
        model: The model's name.
        digest: The model's digest.
        limits: Of context and rows; tasks beyond ``max_rows`` rows wait.
        keep: Takes saves over ``inline_bytes``; without it they fail.
        inline_bytes: Of one run's saves in its event.
    """

    def __init__(
        self,
        *,
        first_token_s: float = 0.0,
        token_s: float = 0.0,
        stop_after: int | None = None,
        fail_after: int | None = None,
        start_error: FabricError | None = None,
        model: str = "fixed",
        digest: str = "sha256:" + "0" * 64,
        limits: Limits | None = None,
        keep: Keep | None = None,
        inline_bytes: int = MAX_INLINE_BYTES,
    ) -> None:
        self.first_token_s = first_token_s
        self.token_s = token_s
        self.stop_after = stop_after
        self.fail_after = fail_after
        self.start_error = start_error
        self.keep = keep
        self.inline_bytes = inline_bytes
        limits = limits or Limits(
            context_tokens=2048,
            max_rows=64,
            cache_tokens=2048 * 64,
            modes=("query", "embed", "program"),
        )
        self._points = get_manifest(model, digest, limits.context_tokens)
        self._info = EngineInfo(
            model=model,
            digest=digest,
            limits=limits,
            dtype="float32",
            engine="fixed-delay",
            points=self._points if "program" in limits.modes else None,
        )
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._waiting: deque[_Job] = deque()
        self._num_rows = 0
        self._agenda: list[tuple[float, int, _Action, _Job]] = []
        self._order = itertools.count()

    @property
    def info(self) -> EngineInfo:
        """Facts of the pretended model."""
        return self._info

    @property
    def failure(self) -> Future[FabricError]:
        """Never done: nothing ends it by itself."""
        return Future()

    def start(self) -> None:
        """Start the thread, or raise ``start_error``."""
        if self.start_error is not None:
            raise self.start_error
        self._thread = threading.Thread(target=self._run, name="fixed-delay-engine", daemon=True)
        self._thread.start()

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task; see ``Engine.submit``."""
        sampling = task.request.sampling
        context_tokens = self._info.limits.context_tokens
        prompt_tokens = count_prompt_tokens(task.request)
        max_tokens = sampling.max_tokens
        if max_tokens is None:
            max_tokens = max(0, context_tokens - prompt_tokens)
        end = max_tokens
        if self.stop_after is not None and not sampling.ignore_eos:
            end = min(end, self.stop_after)
        now = time.monotonic()
        job = _Job(
            task=task,
            sink=sink,
            prompt_tokens=prompt_tokens,
            end=end,
            position=len(task.prefix),
            submitted_at=now,
        )
        if isinstance(task.request.input, ProgramInput):
            try:
                job.program = FixedProgram(task.request.input.program, self._points)
            except FabricError as refusal:
                self._finish(job, refusal)
                return
            job.end = job.program.num_steps
        elif prompt_tokens + max_tokens > context_tokens:
            error = ContextExceeded(
                prompt_tokens=prompt_tokens, max_tokens=max_tokens, context_tokens=context_tokens
            )
            self._finish(job, error)
            return
        if task.request.dimensions not in (None, DIMENSIONS):
            self._finish(
                job,
                RequestInvalid(
                    param="dimensions",
                    value=task.request.dimensions,
                    reason=f"embeddings have {DIMENSIONS}",
                ),
            )
            return
        with self._changed:
            running = self._thread is not None and not self._closed
            if running:
                self._jobs[job.key] = job
                self._waiting.append(job)
                self._schedule(0.0, self._accept, job)
                self._schedule(now + task.deadline_s, self._check, job)
        if not running:
            self._finish(job, EngineStopped(reason="the engine is not running"))

    def cancel(self, task_id: str, attempt: int) -> None:
        """Free the task's rows; see ``Engine.cancel``."""
        with self._changed:
            job = self._jobs.get((task_id, attempt))
            if job is not None:
                job.cancelled = True
                self._schedule(0.0, self._check, job)

    def load(self) -> Load:
        """Return the rows that run and the tasks that wait."""
        with self._changed:
            running = self._num_rows
            return Load(
                num_running=running,
                num_waiting=len(self._waiting),
                cache_usage=min(1.0, running / self._info.limits.max_rows),
                decode_tokens_per_s=running / self.token_s if self.token_s else 0.0,
            )

    def close(self) -> None:
        """Stop the thread; tasks still there fail with ``engine_stopped``."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # ---- the engine's thread, except _schedule ------------------------------------------------

    def _run(self) -> None:
        while (due := self._next()) is not None:
            at, _, action, job = due
            if self._jobs.get(job.key) is job:
                action(job, at)
        for job in list(self._jobs.values()):
            self._finish(job, EngineStopped(reason="the engine was closed"))

    def _next(self) -> tuple[float, int, _Action, _Job] | None:
        """Return what is due next, when it is due, or ``None`` once the engine is closed."""
        with self._changed:
            while not self._closed:
                self._admit()
                timeout_s = None
                if self._agenda:
                    timeout_s = self._agenda[0][0] - time.monotonic()
                    if timeout_s <= 0:
                        return heapq.heappop(self._agenda)
                self._changed.wait(timeout_s)
        return None

    def _admit(self) -> None:
        """Start waiting jobs, first come first served, while there are rows for them."""
        while self._waiting:
            job = self._waiting[0]
            if self._num_rows and self._num_rows + job.num_rows > self._info.limits.max_rows:
                return
            self._waiting.popleft()
            self._num_rows += job.num_rows
            job.started_at = time.monotonic()
            self._schedule(job.started_at + self.first_token_s, self._step, job)

    def _schedule(self, at: float, action: _Action, job: _Job) -> None:
        heapq.heappush(self._agenda, (at, next(self._order), action, job))
        self._changed.notify()

    def _accept(self, job: _Job, _at: float) -> None:
        task = job.task
        job.sink(Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=job.prompt_tokens))
        if task.request.sampling.prompt_logprobs:
            scores = [None, *[LOGPROB] * (job.prompt_tokens - 1)]
            tokens = tuple(
                ScoredToken(token_id=index, text=f" prompt{index}", logprob=score)
                for index, score in enumerate(scores)
            )
            job.sink(PromptScored(task_id=task.id, attempt=task.attempt, tokens=tokens))

    def _check(self, job: _Job, _at: float) -> None:
        """End a job that was cancelled or whose deadline has come."""
        task = job.task
        if job.cancelled:
            self._finish(job, RequestCancelled())
        else:
            self._finish(job, DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt))

    def _step(self, job: _Job, at: float) -> None:
        """Emit one token of every choice, and end the job after its last."""
        if job.position == self.fail_after:
            self._finish(job, RowFailed(reason=f"told to fail after {self.fail_after} tokens"))
            return
        if job.program is not None and not self._save(job, step=job.position):
            return
        if job.position < job.end:
            for choice in range(job.num_rows):
                if job.position < self._end(job, choice):
                    job.sink(self._token(job, choice))
            job.position += 1
        if job.position >= job.end:
            if job.program is not None and not self._save(job, step=None):
                return
            if (task := job.task).request.mode == "embed":
                data = pack_floats(embed(task.request))
                job.sink(Embedding(task_id=task.id, attempt=task.attempt, data=data))
            self._finish(job, None)
            return
        with self._changed:
            self._schedule(at + self.token_s, self._step, job)

    def _save(self, job: _Job, *, step: int | None) -> bool:
        """Emit what a program saves in a step or at its end; return whether it goes on."""
        assert job.program is not None
        try:
            for saves in job.program.saves(
                job.task, step=step, keep=self.keep, inline_bytes=self.inline_bytes
            ):
                job.hook_bytes_out += saves.size
                job.sink(saves)
        except FabricError as error:
            self._finish(job, error)
            return False
        return True

    def _end(self, job: _Job, choice: int) -> int:
        if job.program is None:
            return job.end
        return job.program.program.runs[choice].gen.max_tokens

    def _token(self, job: _Job, choice: int) -> Token:
        text = word(job.position)
        asked = job.task.request.sampling.logprobs
        top = [
            TopLogprob(token_id=FIRST_TOKEN_ID + rank, text=word(rank), logprob=LOGPROB - rank)
            for rank in range(asked or 0)
        ]
        return Token(
            task_id=job.task.id,
            attempt=job.task.attempt,
            choice=choice,
            position=job.position,
            token_id=FIRST_TOKEN_ID + job.position,
            text=text,
            token_text=text,
            logprob=None if asked is None else LOGPROB,
            top_logprobs=tuple(top),
            finish_reason=self._reason(job) if job.position + 1 >= self._end(job, choice) else None,
        )

    def _reason(self, job: _Job) -> Literal["stop", "length"]:
        if job.task.request.mode == "embed":
            return "stop"
        ignores = job.task.request.sampling.ignore_eos
        return "stop" if job.end == self.stop_after and not ignores else "length"

    def _finish(self, job: _Job, error: FabricError | None) -> None:
        """Free the job's rows, then say how it ended, so that a caller who hears it sees it."""
        with self._changed:
            if self._jobs.pop(job.key, None) is not None:
                if job.started_at is None:
                    self._waiting.remove(job)
                else:
                    self._num_rows -= job.num_rows
        task = job.task
        started_at = job.started_at or job.submitted_at
        num_steps = job.position - len(task.prefix)
        usage = Usage(
            prompt_tokens=job.prompt_tokens,
            output_tokens=sum(
                min(num_steps, self._end(job, choice)) for choice in range(job.num_rows)
            ),
            hook_bytes_in=job.program.hook_bytes_in if job.program else 0,
            hook_bytes_out=job.hook_bytes_out,
            queue_s=started_at - job.submitted_at,
            device_s=num_steps * self.token_s + (self.first_token_s if job.program else 0.0),
            kv_block_s=num_steps
            * self.token_s
            * job.num_rows
            * -(-(job.prompt_tokens + job.position) // 16),
        )
        if error is None:
            reasons = (self._reason(job),) * job.num_rows
            job.sink(
                Finished(task_id=task.id, attempt=task.attempt, finish_reasons=reasons, usage=usage)
            )
        else:
            job.sink(
                Failed(
                    task_id=task.id,
                    attempt=task.attempt,
                    failure=Failure.of(error),
                    usage=usage,
                )
            )
