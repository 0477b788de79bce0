"""Finds out, by running it, whether a model can be served and what its cache has to hold."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fabric.engine.attention import Chunk, Scoring, attend_causally
from fabric.engine.cache import BLOCK_TOKENS, LayerShape
from fabric.engine.lowrank import LayerSize
from fabric.engine.runner import Runner, run_ragged, use_our_attention
from fabric.errors import ModelNotLoadable

_NUM_TOKENS = 2 * BLOCK_TOKENS + 3
LEAST_BLOCKS = -(-_NUM_TOKENS // BLOCK_TOKENS)
"""The smallest cache that ``verify_runner`` can run in."""
_NOT_COMPUTED = {"s_aux": "attention sinks"}
_ROTATIONS_OF_THE_BATCH = ("dynamic", "longrope")
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the logits' distance to the model's own attention, relative to their norm."""


def observe_layers(model: PreTrainedModel, *, name: str) -> tuple[LayerShape, ...]:
    """Run a few tokens and return what each layer keeps of a token.

    Shapes are observed, because configurations name them differently in every family. The model
    is left with our attention in place.

    Raises:
        ModelNotLoadable: The model's attention is not one we can compute.
    """
    if model.config.is_encoder_decoder:
        raise ModelNotLoadable(model=name, reason="it is an encoder-decoder, not a causal model")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelNotLoadable(model=name, reason="it cannot compute logits of chosen tokens only")
    if not model._can_set_attn_implementation():
        raise ModelNotLoadable(
            model=name,
            reason=f"{type(model).__name__} does not use transformers' attention interface",
        )
    _refuse_rotations(model, name=name)
    use_our_attention(model)
    seen: dict[int, LayerShape] = {}

    def attend(
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        options: Mapping[str, object],
    ) -> Tensor:
        _refuse_options(options, name=name)
        seen[layer] = LayerShape(num_heads=k.shape[1], key_size=k.shape[2], value_size=v.shape[2])
        return attend_causally(q, k, v, Scoring.of(scale, options, q.shape[2]))

    run_ragged(model, [Chunk(tokens=_tokens(model), start=0, blocks=(), num_wanted=1)], attend)
    num_layers = model.config.num_hidden_layers
    if sorted(seen) != list(range(num_layers)):
        raise ModelNotLoadable(
            model=name,
            reason=f"only {len(seen)} of its {num_layers} layers use attention with a KV cache",
        )
    return tuple(shape for _, shape in sorted(seen.items()))


def reference_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits [n, V] of a few tokens through the model's own attention, in float32.

    Ours is in place again afterwards.
    """
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        ids = torch.tensor([_tokens(model)], device=model.device)
        expected: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    use_our_attention(model)
    return expected


def verify_runner(runner: Runner, expected: Tensor, *, name: str) -> None:
    """Compare prefill, a second chunk and decoding with ``reference_logits``.

    What an option of the attention does not announce (biases, position encodings) shows here, and
    so does a kernel that computes something else than the module whose place it took.

    Raises:
        ModelNotLoadable: The logits differ by more than rounding.
    """
    model = runner.model
    tokens = _tokens(model)
    table = range(1, 1 + LEAST_BLOCKS)
    borders = (0, 5, _NUM_TOKENS - 1, _NUM_TOKENS)
    logits = [
        runner.forward([Chunk(tokens=tokens[a:b], start=a, blocks=table, num_wanted=b - a)])
        for a, b in itertools.pairwise(borders)
    ]
    runner.cache.wipe(table)
    distance = float((torch.cat(logits) - expected).norm() / expected.norm())
    if not distance <= _TOLERANCE[model.dtype]:
        raise ModelNotLoadable(
            model=name,
            reason=f"its logits through the engine's attention are off by {distance:.2g} of"
            " their norm, so that attention has a part which the engine does not compute",
        )


def _refuse_rotations(model: PreTrainedModel, *, name: str) -> None:
    """Refuse rotary positions that depend on the longest row: the batch would change them."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in _ROTATIONS_OF_THE_BATCH:
                raise ModelNotLoadable(
                    model=name,
                    reason=f"its rotary positions ({kind}) depend on the longest row of the batch,"
                    " so a request's answer would depend on others",
                )


def _refuse_options(options: Mapping[str, object], *, name: str) -> None:
    for option, meaning in _NOT_COMPUTED.items():
        if options.get(option) is not None:
            raise ModelNotLoadable(model=name, reason=f"it needs {meaning} in its attention")


def _tokens(model: PreTrainedModel) -> list[int]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [(7 * i * i + 3 * i + 1) % vocabulary for i in range(_NUM_TOKENS)]


def observe_linears(model: PreTrainedModel) -> dict[str, LayerSize]:
    """Run two tokens and return the linear layers that are given every token once, in order.

    That leaves out experts, which see some of the tokens, and the output layer.
    """
    seen: dict[str, list[LayerSize | None]] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = inputs[0].shape, output.shape
        whole = len(x) == len(y) == 3 and x[:2] == y[:2] == (1, 2)
        size = LayerSize(num_inputs=x[-1], num_outputs=y[-1]) if whole else None
        seen.setdefault(name, []).append(size)

    def attend(
        _layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        options: Mapping[str, object],
    ) -> Tensor:
        return attend_causally(q, k, v, Scoring.of(scale, options, q.shape[2]))

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    try:
        chunk = Chunk(tokens=_tokens(model)[:2], start=0, blocks=(), num_wanted=1)
        run_ragged(model, [chunk], attend)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sizes[0] for name, sizes in seen.items() if len(sizes) == 1 and sizes[0]}
