"""The engine over torch and transformers: its thread, and how others reach it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import ExitStack
from logging import getLogger
from typing import TYPE_CHECKING

import torch
import transformers

from fabric import __version__
from fabric.engine.adapters import Adapters, AdapterStats
from fabric.engine.batch import Batch, tell
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.config import EngineConfig
from fabric.engine.constraints import Grammars
from fabric.engine.device import choose_device, describe
from fabric.engine.drafts import Drafter, LookupDrafter
from fabric.engine.encoder_batch import EncoderBatch
from fabric.engine.intake import Intake
from fabric.engine.interface import EngineInfo, EventSink, FetchAdapter
from fabric.engine.native import load_native
from fabric.engine.opening import Opened, get_context_tokens, open_whole
from fabric.engine.programs.prepare import Preparer
from fabric.engine.programs.programs import Programs
from fabric.engine.programs.results import Keep
from fabric.engine.reports import Reports
from fabric.engine.source import ModelSource
from fabric.engine.text import Texts
from fabric.errors import AdapterInvalid, EngineStopped, FabricError, RankLost
from fabric.messages import Limits, Load, Task

if TYPE_CHECKING:
    from fabric.engine.partition.crew import Crew

__all__ = ["VERSIONS", "EngineConfig", "TorchEngine"]

_logger = getLogger(__name__)

_WAKE_S = 30.0
"""How long the thread may take to end after a rank was lost: it may wait for a GPU for ever."""

VERSIONS = (
    f"fabric {__version__} (torch {torch.__version__}, transformers {transformers.__version__})"
)
"""What computes, as instances tell it."""

AnyBatch = Batch | EncoderBatch

Submitted = tuple[Task, EventSink, float]
"""A task, its sink, and when it came."""


class TorchEngine:
    """An ``Engine`` over unmodified transformers modules, on this machine's CPU or a GPU of it.

    Args:
        source: Where the model's files are.
        config: Limits and choices.
        name: What the instance calls the model.
        expected_digest: Of the tensors in the configured dtype; ``None`` takes any.
        keep: Where results of programs go that are too large to be sent: takes a safetensors file
            and returns its handle at once. Without it they are refused.
        crew: The other ranks of a divided model, started; ``None`` lets it start its own.
        fetch_adapter: Gives the files of adapters; without it none are served.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        name: str,
        expected_digest: str | None = None,
        keep: Keep | None = None,
        crew: Crew | None = None,
        fetch_adapter: FetchAdapter | None = None,
    ) -> None:
        self._source = source
        self._keep = keep
        self._config = config
        self._name = name
        self._expected_digest = expected_digest
        self._fetch_adapter = fetch_adapter
        self._adapters: Adapters | None = None
        self._changed = threading.Condition()
        self._submitted: deque[Submitted] = deque()
        self._cancelled: deque[tuple[str, int]] = deque()
        self._closed: EngineStopped | None = EngineStopped(reason="its engine has not started")
        self._thread: threading.Thread | None = None
        self._info: EngineInfo | None = None
        self._load = Load()
        self._crew = crew
        self._failure: Future[FabricError] = Future()
        self._ready: Future[None] = Future()
        self._batch: AnyBatch | None = None
        self._closing = ExitStack()

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Known after ``start``."""
        assert self._info is not None, "the engine has not been started"
        return self._info

    @property
    def failure(self) -> Future[FabricError]:
        """Done when the engine has ended by itself, with the reason."""
        return self._failure

    def start(self) -> None:
        """Load the model and start the engine's thread.

        Raises:
            ModelNotLoadable: The files are missing or of a kind that cannot be served.
            DigestMismatch: The tensors are not those that were asked for.
        """
        self._thread = threading.Thread(target=self._run, name=f"engine {self._name}", daemon=True)
        self._thread.start()
        self._ready.result()

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task and return at once; see ``Engine.submit``."""
        if task.adapter is None:
            self._submit(task, sink, time.monotonic())
        elif self._adapters is not None:
            self._adapters.take(task, sink, time.monotonic())
        else:
            error = AdapterInvalid(adapter=task.adapter, reason="this engine serves no adapters")
            tell(sink, Reports.failed(task, self._closed or error))

    def cancel(self, task_id: str, attempt: int) -> None:
        """Free the task's rows within one step; unknown tasks are ignored."""
        if self._adapters is not None:
            self._adapters.cancel(task_id, attempt)
        with self._changed:
            self._cancelled.append((task_id, attempt))
            self._changed.notify()

    def load(self) -> Load:
        """Return how busy the engine is."""
        with self._changed:
            load, queued = self._load, _num_choices(self._submitted)
        if self._adapters is not None:
            queued += self._adapters.num_waiting
        return load.model_copy(update={"num_waiting": load.num_waiting + queued})

    @property
    def adapters(self) -> AdapterStats:
        """What adapters are loaded, and what happened to them so far."""
        return AdapterStats() if self._adapters is None else self._adapters.stats

    def close(self) -> None:
        """Stop the thread and free the model. Calling it twice is harmless."""
        with self._changed:
            if self._closed is None:
                self._closed = EngineStopped(reason="its engine is stopping")
            closed = self._closed
            self._changed.notify()
        if self._adapters is not None:
            self._adapters.close(closed)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_WAKE_S if self._failure.done() else None)

    def _submit(self, task: Task, sink: EventSink, received_at: float) -> None:
        with self._changed:
            closed = self._closed
            if closed is None:
                self._submitted.append((task, sink, received_at))
                self._changed.notify()
        if closed is not None:
            tell(sink, Reports.failed(task, closed))

    def _run(self) -> None:
        # Loading happens here too: libgomp gives every thread that computes a pool of workers,
        # and stops waiting actively (a fifth of the speed) once there are more than cores.
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        with self._closing:
            try:
                batch = self._build()
            except BaseException as error:
                self._fail_start(error)
                return
            with self._changed:
                if self._failure.done():
                    return
                self._closed = None
                self._ready.set_result(None)
            self._serve(batch)

    def _fail_start(self, error: BaseException) -> None:
        with self._changed:
            if not self._ready.done():
                self._ready.set_exception(error)

    def _build(self) -> AnyBatch:
        config = self._config
        # The compiler runs while weights are read.
        threading.Thread(target=load_native, name="kernels", daemon=True).start()
        opened = self._open()
        loaded, runner = opened.loaded, opened.runner
        model, num_blocks = loaded.model, runner.num_blocks
        context_tokens = get_context_tokens(loaded, config, name=self._name)
        # Only a model that is whole takes adapters.
        fetch_adapter = None if opened.weights is None else self._fetch_adapter
        cache_tokens = num_blocks * BLOCK_TOKENS
        limits = Limits(
            context_tokens=min(context_tokens, cache_tokens),
            max_rows=config.max_rows,
            cache_tokens=cache_tokens,
            modes=("query", "embed", "program") if runner.points else ("query", "embed"),
            adapters=fetch_adapter is not None,
        )
        manifest = None
        if runner.points is not None and opened.weights is not None:
            manifest = runner.points.manifest(
                name=self._name,
                digest=loaded.digest,
                context_tokens=limits.context_tokens,
                weights=opened.weights.shapes,
            )
        texts = Texts(
            loaded.tokenizer,
            vocabulary=loaded.vocabulary,
            context_tokens=limits.context_tokens,
        )
        self._info = EngineInfo(
            model=self._name,
            digest=loaded.digest,
            limits=limits,
            dtype=f"{config.dtype}, weights int8" if config.weights == "int8" else config.dtype,
            engine=VERSIONS + describe(runner.cache.device),
            points=manifest,
        )
        grammars = Grammars(loaded.tokenizer, vocabulary=loaded.vocabulary, eos_ids=loaded.eos_ids)
        threading.Thread(target=grammars.read_tokenizer, name="grammars", daemon=True).start()
        self._adapters = adapters = Adapters(
            runner.lowrank,
            fetch_adapter,
            budget_bytes=config.adapter_bytes,
            submit=self._submit,
            tell=tell,
        )
        intake = Intake(
            texts,
            grammars,
            eos_ids=loaded.eos_ids,
            digest=loaded.digest,
            limits=limits,
            dimensions=model.get_input_embeddings().weight.shape[1],
            deltas_of=adapters.delta_of,
        )
        drafter: Drafter | None = None
        if opened.draft is not None:
            drafter = opened.draft.drafter(num_blocks=num_blocks, step_tokens=config.step_tokens)
        elif config.speculation == "lookup":
            drafter = LookupDrafter()
        reports = Reports(texts)
        programs = None
        if manifest is not None and opened.weights is not None:
            programs = Programs(
                Preparer(texts, manifest, limits),
                runner,
                opened.weights,
                texts,
                reports,
                prefix_key=intake.prefix_key,
                eos_ids=loaded.eos_ids,
                keep=self._keep,
            )
        return Batch(runner, intake, reports, config, drafter, programs)

    def _open(self) -> Opened:
        """Load the model and return it with a runner that has been compared with it."""
        config = self._config
        if config.num_ranks > 1 or config.offload != "none":
            return self._open_divided()
        return open_whole(
            self._source, config, name=self._name, expected_digest=self._expected_digest
        )

    def _open_divided(self) -> Opened:
        from fabric.engine.partition.crew import Crew  # most engines need none of it
        from fabric.engine.partition.opening import open_model

        config = self._config
        if config.num_ranks > 1 and self._crew is None:
            self._crew = Crew(
                num_ranks=config.num_ranks,
                local_ranks=config.local_ranks,
                rendezvous=config.rendezvous,
                rendezvous_fd=config.rendezvous_fd,
                num_threads=config.num_threads,
                timeout_s=config.rank_timeout_s,
                device=choose_device(config),
            )
            self._closing.callback(self._crew.close)
            self._crew.start()
        if self._crew is not None:
            self._crew.on_lost = self._lose
        loaded, runner, close = open_model(
            self._source,
            config,
            name=self._name,
            expected_digest=self._expected_digest,
            crew=self._crew,
        )
        self._closing.callback(close)
        return Opened(loaded=loaded, runner=runner)

    def _lose(self, error: RankLost) -> None:
        """End, because part of the model is gone; called on any thread."""
        with self._changed:
            if not self._failure.done():
                self._failure.set_result(error)
            self._closed = EngineStopped(reason=error.message.rstrip("."))
            self._changed.notify()
        self._fail_start(error)
        if threading.current_thread() is not self._thread:
            threading.Thread(target=self._stop_for_thread, name="stop", daemon=True).start()

    def _stop_for_thread(self) -> None:
        """Fail what the engine's thread has, if it waits for the lost rank and does not wake."""
        assert self._thread is not None
        self._thread.join(_WAKE_S)
        if self._thread.is_alive() and self._batch is not None:
            self._stop(self._batch)

    def _serve(self, batch: AnyBatch) -> None:
        self._batch = batch
        try:
            while self._take_orders(batch):
                batch.step()
                self._publish(batch)
        except RankLost as error:
            self._lose(error)
        except BaseException:  # a panic of the tokenizer's is not an Exception
            _logger.exception("the engine's thread failed", extra={"model": self._name})
            with self._changed:
                self._closed = EngineStopped(reason="its engine failed")
        finally:
            self._stop(batch)

    def _take_orders(self, batch: AnyBatch) -> bool:
        """Wait until there is something to do; return whether to go on."""
        with self._changed:
            while not (batch.busy or self._submitted or self._cancelled or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            submitted, self._submitted = self._submitted, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            self._publish(batch, submitted)
        for task, sink, received_at in submitted:
            batch.add(task, sink, received_at=received_at)
        for task_id, attempt in cancelled:
            batch.cancel(task_id, attempt)
        return True

    def _publish(self, batch: AnyBatch, entering: Collection[Submitted] = ()) -> None:
        load, queued = batch.load(), _num_choices(entering)
        self._load = load.model_copy(update={"num_waiting": load.num_waiting + queued})

    def _stop(self, batch: AnyBatch) -> None:
        with self._changed:
            assert self._closed is not None
            closed = self._closed
            submitted, self._submitted = self._submitted, deque()
            self._load = Load()
        if self._adapters is not None:
            self._adapters.close(closed)
        batch.fail_all(closed)
        for task, sink, _ in submitted:
            tell(sink, Reports.failed(task, closed))


def _num_choices(submitted: Collection[Submitted]) -> int:
    return sum(task.request.sampling.n for task, *_ in submitted)
