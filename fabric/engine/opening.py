"""Loads a whole model into one process, packs it, and holds it to what it computed before."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.config import EngineConfig
from fabric.engine.draft_model import DraftModel, load_draft_model
from fabric.engine.fused import fuse
from fabric.engine.linear import pack_linears
from fabric.engine.model import LoadedModel, load_model
from fabric.engine.probe import (
    LEAST_BLOCKS,
    observe_layers,
    observe_linears,
    reference_logits,
    verify_invariance,
    verify_runner,
)
from fabric.engine.programs.model import Weights
from fabric.engine.programs.points import Points
from fabric.engine.runner import Runner
from fabric.engine.source import ModelSource
from fabric.errors import ModelNotLoadable


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
    """
    loaded = load_model(
        source,
        name=name,
        dtype=config.dtype,
        expected_digest=expected_digest,
        weights=config.weights,
    )

    def reload() -> PreTrainedModel:
        """Load the model again, for what packing has given up."""
        return load_model(
            source,
            name=name,
            dtype=config.dtype,
            expected_digest=loaded.digest,
            weights=config.weights,
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
    cached = [*layers, *(draft.layers if draft else ())]
    block_bytes = sum(layer.num_values for layer in cached) * model.dtype.itemsize * BLOCK_TOKENS
    num_blocks = config.cache_bytes // block_bytes - 1
    if num_blocks < LEAST_BLOCKS:
        raise ModelNotLoadable(
            model=name,
            reason=f"cache_bytes is {config.cache_bytes}, less than the"
            f" {(LEAST_BLOCKS + 1) * block_bytes} bytes"
            " of the smallest cache",
        )
    runner = Runner(
        model, layers, num_blocks=num_blocks, linears=linears, invariant=config.batch_invariant
    )
    verify_runner(runner, expected, name=name, int8=int8)
    if config.batch_invariant:
        verify_invariance(runner, name=name)
    runner.points = Points(model)
    return Opened(loaded=loaded, runner=runner, weights=weights, draft=draft)


def get_context_tokens(loaded: LoadedModel, config: EngineConfig, *, name: str) -> int:
    """Return the longest row that a model and its configuration allow.

    Raises:
        ModelNotLoadable: Neither of them says.
    """
    stated = [n for n in (loaded.context_tokens, config.context_tokens) if n is not None]
    if not stated:
        raise ModelNotLoadable(model=name, reason="it states no context length; set context_tokens")
    return min(stated)
