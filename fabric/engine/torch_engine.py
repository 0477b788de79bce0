"""The engine over torch and transformers: its thread, and how others reach it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from logging import getLogger

import torch
import transformers
from transformers import PreTrainedModel

from fabric import __version__
from fabric.engine.batch import Batch, tell
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.config import EngineConfig
from fabric.engine.constraints import Grammars
from fabric.engine.draft_model import load_draft_model
from fabric.engine.drafts import Drafter, LookupDrafter
from fabric.engine.encoder_batch import EncoderBatch
from fabric.engine.fused import fuse
from fabric.engine.intake import Intake
from fabric.engine.interface import EngineInfo, EventSink
from fabric.engine.linear import pack_linears
from fabric.engine.model import load_model
from fabric.engine.native import load_native
from fabric.engine.probe import (
    LEAST_BLOCKS,
    observe_layers,
    observe_linears,
    reference_logits,
    verify_runner,
)
from fabric.engine.programs.model import Weights
from fabric.engine.programs.points import Points
from fabric.engine.programs.prepare import Preparer
from fabric.engine.programs.programs import Programs
from fabric.engine.programs.results import Keep
from fabric.engine.reports import Reports
from fabric.engine.runner import Runner
from fabric.engine.source import ModelSource
from fabric.engine.text import Texts
from fabric.errors import EngineStopped, ModelNotLoadable
from fabric.messages import Limits, Load, Task

__all__ = ["VERSIONS", "EngineConfig", "TorchEngine"]

_logger = getLogger(__name__)

VERSIONS = (
    f"fabric {__version__} (torch {torch.__version__}, transformers {transformers.__version__})"
)
"""What computes, as instances tell it."""

AnyBatch = Batch | EncoderBatch

Submitted = tuple[Task, EventSink, float]
"""A task, its sink, and when it came."""


class TorchEngine:
    """An ``Engine`` over unmodified transformers modules, on this machine's CPU.

    Args:
        source: Where the model's files are.
        config: Limits and choices.
        name: What the instance calls the model.
        expected_digest: Of the tensors in the configured dtype; ``None`` takes any.
        keep: Where results of programs go that are too large to be sent: takes a safetensors file
            and returns its handle at once. Without it they are refused.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        name: str,
        expected_digest: str | None = None,
        keep: Keep | None = None,
    ) -> None:
        self._source = source
        self._keep = keep
        self._config = config
        self._name = name
        self._expected_digest = expected_digest
        self._changed = threading.Condition()
        self._submitted: deque[Submitted] = deque()
        self._cancelled: deque[tuple[str, int]] = deque()
        self._closed: EngineStopped | None = EngineStopped(reason="its engine has not started")
        self._thread: threading.Thread | None = None
        self._info: EngineInfo | None = None
        self._load = Load()

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Known after ``start``."""
        assert self._info is not None, "the engine has not been started"
        return self._info

    def start(self) -> None:
        """Load the model and start the engine's thread.

        Raises:
            ModelNotLoadable: The files are missing or of a kind that cannot be served.
            DigestMismatch: The tensors are not those that were asked for.
        """
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"engine {self._name}", daemon=True
        )
        self._thread.start()
        ready.result()

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task and return at once; see ``Engine.submit``."""
        with self._changed:
            closed = self._closed
            if closed is None:
                self._submitted.append((task, sink, time.monotonic()))
                self._changed.notify()
        if closed is not None:
            tell(sink, Reports.failed(task, closed))

    def cancel(self, task_id: str, attempt: int) -> None:
        """Free the task's rows within one step; unknown tasks are ignored."""
        with self._changed:
            self._cancelled.append((task_id, attempt))
            self._changed.notify()

    def load(self) -> Load:
        """Return how busy the engine is."""
        with self._changed:
            load, queued = self._load, _num_choices(self._submitted)
        return load.model_copy(update={"num_waiting": load.num_waiting + queued})

    def close(self) -> None:
        """Stop the thread and free the model. Calling it twice is harmless."""
        with self._changed:
            if self._closed is None:
                self._closed = EngineStopped(reason="its engine is stopping")
            self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self, ready: Future[None]) -> None:
        # Loading happens here too: libgomp gives every thread that computes a pool of workers,
        # and stops waiting actively (a fifth of the speed) once there are more than cores.
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        try:
            batch = self._build()
        except BaseException as error:
            ready.set_exception(error)
            return
        self._closed = None
        ready.set_result(None)
        self._serve(batch)

    def _build(self) -> AnyBatch:
        config = self._config
        # The compiler runs while weights are read.
        threading.Thread(target=load_native, name="kernels", daemon=True).start()
        loaded = load_model(
            self._source, name=self._name, dtype=config.dtype, expected_digest=self._expected_digest
        )
        model = loaded.model
        stated = [n for n in (loaded.context_tokens, config.context_tokens) if n is not None]
        if not stated:
            raise ModelNotLoadable(
                model=self._name, reason="it states no context length; set context_tokens"
            )
        context_tokens = min(stated)
        layers = observe_layers(model, name=self._name)
        draft = None
        if config.draft_model is not None:
            draft = load_draft_model(
                config.draft_model, loaded, dtype=config.dtype, context_tokens=context_tokens
            )
        cached = [*layers, *(draft.layers if draft else ())]
        block_bytes = (
            sum(layer.num_values for layer in cached) * model.dtype.itemsize * BLOCK_TOKENS
        )
        num_blocks = config.cache_bytes // block_bytes - 1
        if num_blocks < LEAST_BLOCKS:
            raise ModelNotLoadable(
                model=self._name,
                reason=f"cache_bytes is {config.cache_bytes}, less than the"
                f" {(LEAST_BLOCKS + 1) * block_bytes} bytes"
                " of the smallest cache",
            )
        linears = observe_linears(model)
        weights = Weights(model, self._reload)
        expected = reference_logits(model)
        pack_linears(model)
        fuse(model)
        runner = Runner(model, layers, num_blocks=num_blocks, linears=linears)
        verify_runner(runner, expected, name=self._name)
        cache_tokens = num_blocks * BLOCK_TOKENS
        limits = Limits(
            context_tokens=min(context_tokens, cache_tokens),
            max_rows=config.max_rows,
            cache_tokens=cache_tokens,
            modes=("query", "embed", "program"),
        )
        runner.points = Points(model)
        manifest = runner.points.manifest(
            name=self._name,
            digest=loaded.digest,
            context_tokens=limits.context_tokens,
            weights=weights.shapes,
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
            dtype=config.dtype,
            engine=VERSIONS,
            points=manifest,
        )
        grammars = Grammars(loaded.tokenizer, vocabulary=loaded.vocabulary, eos_ids=loaded.eos_ids)
        threading.Thread(target=grammars.read_tokenizer, name="grammars", daemon=True).start()
        intake = Intake(
            texts,
            grammars,
            eos_ids=loaded.eos_ids,
            digest=loaded.digest,
            limits=limits,
            dimensions=model.get_input_embeddings().weight.shape[1],
        )
        drafter: Drafter | None = None
        if draft is not None:
            drafter = draft.drafter(num_blocks=num_blocks, step_tokens=config.step_tokens)
        elif config.speculation == "lookup":
            drafter = LookupDrafter()
        reports = Reports(texts)
        programs = Programs(
            Preparer(texts, manifest, limits),
            runner,
            weights,
            texts,
            reports,
            prefix_key=intake.prefix_key,
            eos_ids=loaded.eos_ids,
            keep=self._keep,
        )
        return Batch(runner, intake, reports, config, drafter, programs)

    def _reload(self) -> PreTrainedModel:
        """Load the model again, for what packing has given up."""
        return load_model(
            self._source,
            name=self._name,
            dtype=self._config.dtype,
            expected_digest=self.info.digest,
        ).model

    def _serve(self, batch: AnyBatch) -> None:
        try:
            while self._take_orders(batch):
                batch.step()
                self._publish(batch)
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
        batch.fail_all(closed)
        for task, sink, _ in submitted:
            tell(sink, Reports.failed(task, closed))


def _num_choices(submitted: Collection[Submitted]) -> int:
    return sum(task.request.sampling.n for task, *_ in submitted)
