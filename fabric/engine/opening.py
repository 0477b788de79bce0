"""Loads a whole model into one process, packs it, and holds it to what it computed before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from logging import getLogger

from transformers import PreTrainedModel

from fabric.engine.attention import StepAttention
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.config import EngineConfig
from fabric.engine.device import choose_cache_bytes, choose_device, uses_flex
from fabric.engine.draft_model import DraftModel, load_draft_model
from fabric.engine.flex import FlexAttention
from fabric.engine.fused import fuse
from fabric.engine.graphs import CudaCapture
from fabric.engine.linear import pack_linears
from fabric.engine.model import LoadedModel, load_model
from fabric.engine.probe import (
    LEAST_BLOCKS,
    observe_layers,
    observe_linears,
    reference_logits,
    run_largest,
    verify_graphs,
    verify_invariance,
    verify_runner,
)
from fabric.engine.programs.model import Weights
from fabric.engine.programs.points import Points
from fabric.engine.runner import Runner
from fabric.engine.source import ModelSource
from fabric.errors import FabricError, ModelNotLoadable

_logger = getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model that is ready to run.

    ``weights`` are its parameters as programs see them, ``None`` where no programs can be run;
    ``draft`` is the smaller model that guesses its tokens, if there is one.
    """

    loaded: LoadedModel
    runner: Runner
    weights: Weights | None = None
    draft: DraftModel | None = None


def open_whole(
    source: ModelSource, config: EngineConfig, *, name: str, expected_digest: str | None
) -> Opened:
    """Load a model into this process.

    Raises:
        ModelNotLoadable: The files are missing or of a kind that cannot be served, or the cache is
            too small.
        DigestMismatch: The tensors are not those that were asked for.
        SettingInvalid: It cannot be where it is asked to be.
    """
    device = choose_device(config)
    loaded = load_model(
        source,
        name=name,
        dtype=config.dtype,
        expected_digest=expected_digest,
        weights=config.weights,
        device=device,
    )

    def reload() -> PreTrainedModel:
        """Load the model again, for what packing has given up."""
        return load_model(
            source,
            name=name,
            dtype=config.dtype,
            expected_digest=loaded.digest,
            weights=config.weights,
            device=device,
        ).model

    model = loaded.model
    layers = observe_layers(model, name=name)
    linears = observe_linears(model)
    weights = Weights(model, reload)
    expected = reference_logits(model)
    int8 = config.weights == "int8"
    pack_linears(model, invariant=config.batch_invariant, int8=int8)
    fuse(model)
    draft = None
    if config.draft_model is not None:
        draft = load_draft_model(
            config.draft_model,
            loaded,
            dtype=config.dtype,
            context_tokens=get_context_tokens(loaded, config, name=name),
        )
    with_flex = uses_flex(config, device)
    with_graphs = with_flex and config.graphs
    cached = [*layers, *(draft.layers if draft else ())]
    block_bytes = sum(layer.num_values for layer in cached) * model.dtype.itemsize * BLOCK_TOKENS
    run = partial(run_largest, model, num_tokens=config.step_tokens, num_wanted=config.max_rows)
    cache_bytes = choose_cache_bytes(config, device, run)
    num_blocks = cache_bytes // block_bytes - (2 if with_graphs else 1)
    if num_blocks < LEAST_BLOCKS:
        raise ModelNotLoadable(
            model=name,
            reason=f"cache_bytes is {cache_bytes}, less than the"
            f" {(LEAST_BLOCKS + 1) * block_bytes} bytes"
            " of the smallest cache",
        )
    runner = Runner(
        model,
        layers,
        num_blocks=num_blocks,
        linears=linears,
        invariant=config.batch_invariant,
        attention=FlexAttention if with_flex else StepAttention,
        scratch=with_graphs,
    )
    try:
        verify_runner(runner, expected, name=name, int8=int8)
    except Exception as error:
        if isinstance(error, FabricError) or not with_flex:
            raise
        reason = f"flex attention cannot run it ({error}); set attention: gathered"
        raise ModelNotLoadable(model=name, reason=reason) from error
    if with_graphs:
        context_tokens = get_context_tokens(loaded, config, name=name)
        most = min(-(-context_tokens // BLOCK_TOKENS), num_blocks)
        _graph(runner, name=name, max_rows=config.max_rows, num_blocks=most)
    if config.batch_invariant:
        verify_invariance(runner, name=name)
    if device.type == "cpu":
        runner.points = Points(model)
    return Opened(loaded=loaded, runner=runner, weights=weights, draft=draft)


def _graph(runner: Runner, *, name: str, max_rows: int, num_blocks: int) -> None:
    """Capture decoding; a model that cannot be captured runs without."""
    try:
        runner.graph_decoding(max_rows=max_rows, num_blocks=num_blocks, capture=CudaCapture())
    except RuntimeError as error:
        _logger.warning("decoding is not captured: %s", error, extra={"model": name})
    else:
        verify_graphs(runner, name=name)


def get_context_tokens(loaded: LoadedModel, config: EngineConfig, *, name: str) -> int:
    """Return the longest row that a model and its configuration allow.

    Raises:
        ModelNotLoadable: Neither of them says.
    """
    stated = [n for n in (loaded.context_tokens, config.context_tokens) if n is not None]
    if not stated:
        raise ModelNotLoadable(model=name, reason="it states no context length; set context_tokens")
    return min(stated)
