"""Finds out, by running it, whether a model can be served and what its cache has to hold."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fabric.engine.attention import Chunk, Scoring, attend_causally
from fabric.engine.cache import BLOCK_TOKENS, LayerShape
from fabric.engine.linear import PackedLinear
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
_INT8_TOLERANCE = 0.2
"""The same, where weights of 8 bits take the place of the model's."""


def observe_layers(
    model: PreTrainedModel, *, name: str, expected: range | None = None
) -> tuple[LayerShape, ...]:
    """Run a few tokens and return what each layer keeps of a token.

    Args:
        model: Any; not yet set to our attention.
        name: What errors call it.
        expected: The layers that are here; ``None``: all.

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
    if expected is None:
        expected = range(model.config.num_hidden_layers)
    if sorted(seen) != list(expected):
        raise ModelNotLoadable(
            model=name,
            reason=f"only {len(seen)} of its {len(expected)} layers use attention with a KV cache",
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


def verify_runner(runner: Runner, expected: Tensor, *, name: str, int8: bool = False) -> None:
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
    if not distance <= (_INT8_TOLERANCE if int8 else _TOLERANCE[model.dtype]):
        raise ModelNotLoadable(
            model=name,
            reason=f"its logits through the engine's attention are off by {distance:.2g} of"
            " their norm, so that attention has a part which the engine does not compute",
        )


def verify_graphs(runner: Runner, *, name: str) -> None:
    """Compare captured steps of one and of three rows with the same steps by the modules.

    Raises:
        ModelNotLoadable: The logits differ by more than rounding.
    """
    tokens = _tokens(runner.model)
    rows = [
        Chunk(tokens=tokens[:size], start=0, blocks=(block,), num_wanted=1)
        for block, size in enumerate((3, BLOCK_TOKENS - 1, 1), start=1)
    ]
    runner.forward(rows[::-1])
    due = [replace(row, tokens=tokens[-1:], start=len(row.tokens)) for row in rows]
    graphs, distance = runner.graphs, 0.0
    for step in (due[:1], due):
        captured = runner.forward(step)
        runner.graphs = None
        expected = runner.forward(step)
        runner.graphs = graphs
        distance = max(distance, float((captured - expected).norm() / expected.norm()))
    runner.cache.wipe(range(1, len(rows) + 1))
    if not distance <= _TOLERANCE[runner.model.dtype]:
        raise ModelNotLoadable(
            model=name,
            reason=f"its logits from captured steps are off by {distance:.2g} of their norm;"
            " set graphs: false",
        )


def verify_invariance(runner: Runner, *, name: str) -> None:
    """Compare the bits of a row's logits when it runs whole, in pieces, and beside another.

    Raises:
        ModelNotLoadable: They differ, so that answers would depend on the batch.
    """
    tokens = _tokens(runner.model)
    row, other = tokens[: BLOCK_TOKENS + 3], tokens[-BLOCK_TOKENS:]
    table, others = (1, 2), (3,)

    def chunk(begin: int, end: int) -> Chunk:
        return Chunk(tokens=row[begin:end], start=begin, blocks=table, num_wanted=end - begin)

    def beside(tokens: list[int]) -> Chunk:
        return Chunk(tokens=tokens, start=0, blocks=others, num_wanted=0)

    size = len(row)
    whole = runner.forward([chunk(0, size)])
    pieces = [runner.forward([chunk(a, b)]) for a, b in itertools.pairwise((0, 5, size - 1, size))]
    crowd = [
        runner.forward([beside(other[:1]), chunk(0, 2)]),
        runner.forward([beside(other), chunk(2, size)]),
    ]
    runner.cache.wipe((*table, *others))
    if not (torch.equal(torch.cat(pieces), whole) and torch.equal(torch.cat(crowd), whole)):
        raise ModelNotLoadable(
            model=name,
            reason="a part of it computes other bits for a row by what runs beside it;"
            " serve it without batch_invariant",
        )


def run_largest(model: PreTrainedModel, *, num_tokens: int, num_wanted: int) -> None:
    """Run one row of so many tokens without a cache, for the memory that it takes."""
    tokens = (_tokens(model) * -(-num_tokens // _NUM_TOKENS))[:num_tokens]
    chunk = Chunk(tokens=tokens, start=0, blocks=(), num_wanted=min(num_wanted, num_tokens))
    run_ragged(model, [chunk], _attend_alone)


def _attend_alone(
    _layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    options: Mapping[str, object],
) -> Tensor:
    return attend_causally(q, k, v, Scoring.of(scale, options, q.shape[2]))


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
    vocabulary = model.config.vocab_size
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

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | PackedLinear)
    ]
    try:
        chunk = Chunk(tokens=_tokens(model)[:2], start=0, blocks=(), num_wanted=1)
        run_ragged(model, [chunk], _attend_alone)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sizes[0] for name, sizes in seen.items() if len(sizes) == 1 and sizes[0]}
