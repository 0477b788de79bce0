"""Runs unmodified transformers modules over the chunks of one step.

All tokens of a step lie in one ragged row ``[1, N, hidden]``; only attention has to know which
token belongs to whom, and attention is ours, registered through transformers' interface. So any
family that uses the interface can be served, and every PyTorch hook works.

Shapes: N tokens of the step, W tokens whose logits are wanted, V vocabulary, B single-token
chunks, M cached tokens (padded), H query heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fabric.engine.cache import BLOCK_TOKENS, KvCache, LayerShape

ATTENTION = "fabric"
"""The name of our attention in transformers' registries."""

Attend = Callable[[int, Tensor, Tensor, Tensor, "float | None", Mapping[str, object]], Tensor]
"""(layer, q_NHD, k_NKD, v_NKD, scale, options of the module) -> out_NHD."""

_attend: ContextVar[Attend] = ContextVar("fabric_attend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one row.

    ``start`` is the position of the first; keys and values of the positions before it are in
    ``blocks``, the row's table. Logits are wanted of the last ``num_wanted`` tokens.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    num_wanted: int


class Runner:
    """One model over one KV cache.

    Args:
        model: Set to our attention (``use_our_attention``).
        layers: The shape of each layer's keys and values.
        num_blocks: Cache blocks that can be given out.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[LayerShape], *, num_blocks: int
    ) -> None:
        self._model = model
        self.num_blocks = num_blocks
        self.cache = KvCache(layers, num_blocks=num_blocks, dtype=model.dtype)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run one step.

        Args:
            chunks: At least one, of different rows; single-token ones first for speed.

        Returns:
            The wanted logits in the chunks' order, [W, V] in float32.
        """
        step = _Step(chunks, self.cache)
        return run_ragged(self._model, chunks, step.attend)


def run_ragged(model: PreTrainedModel, chunks: Sequence[Chunk], attend: Attend) -> Tensor:
    """Run the model over the chunks' tokens with this attention; return logits [W, V], float32."""
    ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for chunk in chunks:
        ids.extend(chunk.tokens)
        positions.extend(range(chunk.start, chunk.start + len(chunk.tokens)))
        wanted.extend(range(len(ids) - chunk.num_wanted, len(ids)))
    # A context variable, because the registered function is one for all engines of the process.
    token = _attend.set(attend)
    try:
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, dtype=torch.long),
            )
    finally:
        _attend.reset(token)
    logits: Tensor = output.logits[0].float()
    return logits


def use_our_attention(model: PreTrainedModel) -> None:
    """Let the model call the attention that ``run_ragged`` is given."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    model.set_attn_implementation(ATTENTION)


def _no_mask(*_: object, **__: object) -> None:
    return None


def _attention(
    module: torch.nn.Module,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    **options: object,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx
    q, k, v = (x[0].transpose(0, 1) for x in (query_1HND, key_1KND, value_1KND))
    return _attend.get()(layer, q, k, v, scaling, options)[None], None


class _Step:
    """The attention of one step: decoding rows together, then each longer chunk by itself."""

    def __init__(self, chunks: Sequence[Chunk], cache: KvCache) -> None:
        self._cache = cache
        singles = list(itertools.takewhile(lambda chunk: len(chunk.tokens) == 1, chunks))
        self._num_singles = len(singles)
        self._spans: list[_Span] = []
        end = self._num_singles
        for chunk in chunks[self._num_singles :]:
            begin, end = end, end + len(chunk.tokens)
            self._spans.append(_Span(chunk, begin, end))
        self._slots_N = torch.tensor([slot for chunk in chunks for slot in _slots(chunk)])
        if singles:
            lengths = torch.tensor([chunk.start + 1 for chunk in singles])
            most = _num_blocks(int(lengths.max()))
            tables = [_table(chunk, most) for chunk in singles]
            self._tables = torch.tensor(tables)
            visible = torch.arange(most * BLOCK_TOKENS) < lengths[:, None]
            self._visible_B11M = visible[:, None, None]

    def attend(
        self,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        scale: float | None,
        _: Mapping[str, object],
    ) -> Tensor:
        self._cache.write(layer, self._slots_N, k_NKD, v_NKD)
        outputs = []
        if self._num_singles:
            outputs.append(self._attend_singles(layer, q_NHD[: self._num_singles], scale))
        for span in self._spans:
            rows = slice(span.begin, span.end)
            outputs.append(self._attend_span(layer, span, q_NHD, k_NKD[rows], v_NKD[rows], scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_singles(self, layer: int, q_BHD: Tensor, scale: float | None) -> Tensor:
        k_BMKD, v_BMKD = self._cache.read(layer, self._tables)
        # The query heads of one key-value head stand as G queries: no key is repeated.
        q_BKGD = q_BHD.reshape(q_BHD.shape[0], k_BMKD.shape[2], -1, q_BHD.shape[2])
        out_BKGD = F.scaled_dot_product_attention(
            q_BKGD,
            k_BMKD.transpose(1, 2),
            v_BMKD.transpose(1, 2),
            attn_mask=self._visible_B11M,
            scale=scale,
        )
        return out_BKGD.reshape(q_BHD.shape[0], q_BHD.shape[1], -1)

    def _attend_span(
        self,
        layer: int,
        span: _Span,
        q_NHD: Tensor,
        k_nKD: Tensor,
        v_nKD: Tensor,
        scale: float | None,
    ) -> Tensor:
        if span.table is not None:
            k_1MKD, v_1MKD = self._cache.read(layer, span.table)
            k_nKD, v_nKD = k_1MKD[0], v_1MKD[0]
        out_1HnD = F.scaled_dot_product_attention(
            q_NHD[span.begin : span.end].transpose(0, 1)[None],
            k_nKD.transpose(0, 1)[None],
            v_nKD.transpose(0, 1)[None],
            attn_mask=span.visible,
            is_causal=span.visible is None,
            scale=scale,
            enable_gqa=True,
        )
        return out_1HnD[0].transpose(0, 1)


class _Span:
    """A chunk of several tokens at ``begin:end`` of the ragged row; ``table`` if it has a past."""

    def __init__(self, chunk: Chunk, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.table: Tensor | None = None
        self.visible: Tensor | None = None
        if chunk.start:
            length = chunk.start + len(chunk.tokens)
            most = _num_blocks(length)
            self.table = torch.tensor([_table(chunk, most)])
            self.visible = (
                torch.arange(most * BLOCK_TOKENS) <= torch.arange(chunk.start, length)[:, None]
            )


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _table(chunk: Chunk, length: int) -> list[int]:
    table = list(chunk.blocks[:length])
    return table + [0] * (length - len(table))


def _slots(chunk: Chunk) -> list[int]:
    return [
        chunk.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
        for position in range(chunk.start, chunk.start + len(chunk.tokens))
    ]
