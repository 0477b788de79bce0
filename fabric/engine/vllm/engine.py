"""The ``Engine`` over a vLLM server: a thread with an event loop, and one request a task."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from logging import getLogger

import httpx

from fabric.engine.batch import tell
from fabric.engine.config import EngineConfig
from fabric.engine.constraints import Grammars
from fabric.engine.intake import Intake
from fabric.engine.interface import EngineInfo, EventSink
from fabric.engine.reports import Reports
from fabric.engine.rows import ActiveTask
from fabric.engine.source import ModelSource
from fabric.engine.text import Texts
from fabric.engine.vllm.answers import Answers
from fabric.engine.vllm.command import get_runner
from fabric.engine.vllm.embeddings import Pooled, find_pooling, get_sample
from fabric.engine.vllm.facts import ModelFacts, read_facts
from fabric.engine.vllm.load import Busy, Gauges
from fabric.engine.vllm.server import ServerInfo, VllmServer
from fabric.errors import (
    DeadlineExceeded,
    EngineStopped,
    FabricError,
    ModelNotLoadable,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import Limits, Load, Task, VllmOptions

_logger = getLogger(__name__)

_LOOK_S = 1.0
"""How often the server is asked how it is."""

_NUM_SILENT = 5
"""Looks without an answer after which a server is given up."""

Key = tuple[str, int]


@dataclass(slots=True, kw_only=True)
class _Running:
    """A task that is with the server; ``error`` says why it was ended from here."""

    asking: asyncio.Task[None]
    error: FabricError | None = None


class VllmEngine:
    """An ``Engine`` that lets a vLLM server compute, and does the rest as ``TorchEngine`` does.

    Prompts are tokenized, limits checked, ids read into text and tool calls found here, so that a
    client sees no difference. Its server generates or embeds (``VllmOptions.runner``), not both,
    and runs no programs.

    Args:
        source: A transformers directory.
        config: Limits; the server is started with them.
        options: The server's command, or where it runs.
        name: What the instance calls the model.
        expected_digest: Of the tensors in the configured dtype; ``None`` takes any.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig,
        options: VllmOptions,
        *,
        name: str,
        expected_digest: str | None = None,
    ) -> None:
        self._source = source
        self._config = config
        self._options = options
        self._name = name
        self._expected_digest = expected_digest
        self._info: EngineInfo | None = None
        self._failure: Future[FabricError] = Future()
        self._server: VllmServer | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed: EngineStopped | None = EngineStopped(reason="its engine has not started")
        self._guard = threading.Lock()
        """Between a task that comes and an engine that ends."""
        self._running: dict[Key, _Running] = {}
        self._busy = Busy()
        self._gauges = Gauges()

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Known after ``start``."""
        assert self._info is not None, "the engine has not been started"
        return self._info

    @property
    def failure(self) -> Future[FabricError]:
        """Done when the server has ended or fallen silent."""
        return self._failure

    def start(self) -> None:
        """Check the model's files, start the server over them and the engine's thread.

        Raises:
            ModelNotLoadable: The files are missing or of a kind that cannot be served, or the
                server did not come up.
            DigestMismatch: The tensors are not those that were asked for.
        """
        path = self._source.resolve()
        if path.is_file():
            raise ModelNotLoadable(
                model=self._name,
                reason=f"{self._source} is a GGUF file; vLLM serves transformers directories here",
            )
        config = self._config
        facts = read_facts(
            self._source,
            config,
            name=self._name,
            expected_digest=self._expected_digest,
            embeds=get_runner(self._options, path) == "pooling",
        )
        server = self._server = VllmServer(self._options, path=path, config=config, name=self._name)
        try:
            told = server.start()
            if facts.pooled is not None:
                self._compare(server, told, facts, facts.pooled)
            ready: Future[None] = Future()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._run(facts, told, ready)),
                name=f"engine {self._name}",
                daemon=True,
            )
            self._thread.start()
            ready.result()
        except BaseException:
            server.close()
            raise

    def _compare(
        self, server: VllmServer, told: ServerInfo, facts: ModelFacts, pooled: Pooled
    ) -> None:
        """Refuse a server whose vectors are others than the files' own."""
        ids = get_sample(facts.vocabulary)
        vector_H = server.embed(ids, told.served_name, dimensions=facts.dimensions)
        found = find_pooling(vector_H, pooled, dtype=self._config.dtype)
        if found != facts.pooling:
            reason = (
                f"its vLLM server's vectors are its hidden states pooled otherwise ({found})"
                if found
                else "its vLLM server's vectors are not those of its hidden states"
            )
            remedy = f"start it with a --pooler-config that pools by {facts.pooling}"
            raise ModelNotLoadable(model=self._name, reason=f"{reason}; {remedy}")

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task and return at once; see ``Engine.submit``."""
        received_at = time.monotonic()
        with self._guard:
            if self._closed is None:
                self._call(lambda: self._begin(task, sink, received_at))
                return
            closed = self._closed
        tell(sink, Reports.failed(task, closed))

    def cancel(self, task_id: str, attempt: int) -> None:
        """Leave the server's answer; unknown tasks are ignored."""
        with self._guard:
            if self._closed is None:
                self._call(lambda: self._end((task_id, attempt), RequestCancelled()))

    def load(self) -> Load:
        """Return how busy the server is, by its own figures of at most a second ago."""
        return self._busy.load(self._gauges, max_rows=self._config.max_rows)

    def close(self) -> None:
        """Stop the thread and the server. Calling it twice is harmless."""
        self._stop(EngineStopped(reason="its engine is stopping"))
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._server is not None:
            self._server.close()

    def _stop(self, error: EngineStopped) -> None:
        with self._guard:
            if self._closed is None:
                self._closed = error
                self._call(self._stopping.set)

    def _reason_closed(self) -> EngineStopped:
        return self._closed or EngineStopped(reason="its engine is stopping")

    def _call(self, callback: Callable[[], object]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(callback)

    # ---- the engine's thread -----------------------------------------------------------------

    async def _run(self, facts: ModelFacts, told: ServerInfo, ready: Future[None]) -> None:
        assert self._server is not None
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(10.0, read=None)
        async with httpx.AsyncClient(
            base_url=self._server.url, headers=self._server.headers, timeout=timeout, limits=limits
        ) as http:
            try:
                self._gauges = await Gauges.read(http)
                self._prepare(facts, told, http)
            except BaseException as error:
                ready.set_exception(error)
                return
            self._closed = None
            ready.set_result(None)
            watching = asyncio.create_task(self._watch(http))
            await self._stopping.wait()
            watching.cancel()
            for key in list(self._running):
                self._end(key, self._reason_closed())
            await asyncio.gather(
                *(running.asking for running in self._running.values()), return_exceptions=True
            )

    def _prepare(self, facts: ModelFacts, told: ServerInfo, http: httpx.AsyncClient) -> None:
        config = self._config
        stated = (told.context_tokens, config.context_tokens, facts.context_tokens)
        context_tokens = min(filter(None, stated))
        embeds = facts.pooled is not None
        # What is pooled keeps nothing between prompts.
        cache_tokens = 0 if embeds else self._gauges.cache_tokens
        limits = Limits(
            context_tokens=context_tokens,
            max_rows=config.max_rows,
            cache_tokens=cache_tokens or context_tokens * config.max_rows,
            modes=("embed",) if embeds else ("query",),
        )
        self._pooling = facts.pooling
        self._info = EngineInfo(
            model=self._name,
            digest=facts.digest,
            limits=limits,
            dtype=config.dtype,
            engine=f"vllm {told.version}",
        )
        tokenizer, vocabulary = facts.tokenizer, facts.vocabulary
        texts = facts.texts or Texts(
            tokenizer, vocabulary=vocabulary, context_tokens=context_tokens
        )
        self._intake = Intake(
            texts,
            Grammars(tokenizer, vocabulary=vocabulary, eos_ids=facts.eos_ids),
            eos_ids=facts.eos_ids,
            digest=facts.digest,
            limits=limits,
            dimensions=facts.dimensions,
            deltas_of=lambda _: (),
        )
        self._reports = Reports(texts)
        self._answers = Answers(
            http, self._reports, served_name=told.served_name, dimensions=facts.dimensions
        )

    def _begin(self, task: Task, sink: EventSink, received_at: float) -> None:
        key = (task.id, task.attempt)
        try:
            if key in self._running:
                raise RequestInvalid(
                    param="attempt", value=task.attempt, reason="this attempt is running already"
                )
            active = self._activate(task, sink, received_at)
        except FabricError as error:
            tell(sink, Reports.failed(task, error))
            return
        except Exception as error:
            _logger.exception("a task could not be prepared", extra={"task": task.id})
            reason = f"{type(error).__name__}: {error}"
            tell(sink, Reports.failed(task, RowFailed(reason=reason)))
            return
        tell(sink, Reports.accepted(active))
        if active.finished:
            tell(sink, Reports.finished(active))
            return
        self._busy.begin(key, len(active.rows), len(active.prompt))
        asking = asyncio.create_task(self._ask(active))
        self._running[key] = _Running(asking=asking)
        # Not in the task itself: one that is cancelled before it began never runs.
        asking.add_done_callback(lambda asked: self._conclude(key, active, asked))

    def _activate(self, task: Task, sink: EventSink, received_at: float) -> ActiveTask:
        request, sampling = task.request, task.request.sampling
        [served] = self.info.limits.modes
        if request.mode != served:
            raise RequestInvalid(
                param="mode", value=request.mode, reason=f"this instance serves the mode {served}"
            )
        if request.pooling not in (None, self._pooling):
            raise RequestInvalid(
                param="pooling",
                value=request.pooling,
                reason=f"its vLLM server pools by {self._pooling} alone; leave it out",
            )
        if task.prefix and sampling.temperature:
            # vLLM draws from one generator a request, which would start again.
            raise RequestInvalid(
                param="prefix",
                value=f"{len(task.prefix)} tokens",
                reason="with vLLM only a greedy answer can be resumed",
            )
        active = self._intake.activate(task, sink, received_at=received_at)
        for row in active.rows:
            row.matcher = None  # the server holds the answer to its constraint
        return active

    async def _ask(self, active: ActiveTask) -> None:
        task = active.task
        try:
            async with asyncio.timeout_at(self._deadline_at(active)):
                await self._answers.run(active)
        except TimeoutError:
            raise DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt) from None

    def _conclude(self, key: Key, active: ActiveTask, asked: asyncio.Task[None]) -> None:
        ended_by = self._running.pop(key).error
        device_s = self._busy.end(key, active.usage.output_tokens, embedded=active.embeds)
        active.usage = active.usage.model_copy(update={"device_s": device_s})
        failure = None if asked.cancelled() else asked.exception()
        if asked.cancelled():
            error: FabricError | None = ended_by or RequestCancelled()
        elif failure is None or isinstance(failure, FabricError):
            error = failure
        else:
            _logger.error("a task failed", exc_info=failure, extra={"task": active.task.id})
            error = RowFailed(reason=f"{type(failure).__name__}: {failure}")
        if error is None:
            tell(active.sink, Reports.finished(active))
        else:
            tell(active.sink, Reports.failed(active.task, error, active.usage))

    def _deadline_at(self, active: ActiveTask) -> float:
        since_s = time.monotonic() - active.received_at
        return asyncio.get_running_loop().time() + active.task.deadline_s - since_s

    def _end(self, key: Key, error: FabricError) -> None:
        running = self._running.get(key)
        if running is not None and running.error is None:
            running.error = error
            running.asking.cancel()

    async def _watch(self, http: httpx.AsyncClient) -> None:
        """Follow the server's load; stop the engine once the server has gone."""
        assert self._server is not None
        num_silent = 0
        while num_silent < _NUM_SILENT:
            await asyncio.sleep(_LOOK_S)
            if (ended := self._server.how_it_ended()) is not None:
                break
            with suppress(httpx.HTTPError):
                self._gauges, num_silent = await Gauges.read(http), -1
            num_silent += 1
        else:
            ended = f"its vLLM server did not answer {_NUM_SILENT} times"
        _logger.error("the server failed", extra={"model": self._name, "reason": ended})
        error = EngineStopped(reason=ended)
        self._failure.set_result(error)
        self._stop(error)
