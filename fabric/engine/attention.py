"""Attention of one step over the paged cache: short chunks together, longer ones one by one.

A token attends over its row's blocks alone, so each token of a short chunk is computed as if its
row decoded it: what speculation verifies is, bit by bit, what decoding computes.

Shapes: N tokens of the step, B tokens of short chunks, n tokens of one chunk, M cached tokens
(whole blocks), H query heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fabric.engine.cache import BLOCK_TOKENS, KvCache
from fabric.engine.device import put
from fabric.engine.lowrank import Delta
from fabric.engine.native import load_native

_SHORT_TOKENS = BLOCK_TOKENS
"""The longest chunk that the CPU's kernel computes token by token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one row.

    ``start`` is the position of the first; keys and values of the positions before it are in
    ``blocks``, the row's table. Logits are wanted of the last ``num_wanted`` tokens. ``deltas``
    change the model's linear layers for these tokens alone.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    num_wanted: int
    deltas: tuple[Delta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a module wants its scores made.

    Args:
        scale: Of the products.
        window: Tokens that a query sees, counted back from itself; 0: all before it.
        cap: The scores stay under it, by tanh; 0: no cap.
    """

    scale: float
    window: int = 0
    cap: float = 0.0

    @staticmethod
    def of(scale: float | None, options: Mapping[str, object], head_size: int) -> Scoring:
        """Return what a module's call of the attention interface asks for."""
        window, cap = options.get("sliding_window"), options.get("softcap")
        return Scoring(
            scale=head_size**-0.5 if scale is None else scale,
            window=window if isinstance(window, int) else 0,
            cap=float(cap) if isinstance(cap, int | float) else 0.0,
        )


def attend_causally(q_nHD: Tensor, k_nKD: Tensor, v_nKD: Tensor, scoring: Scoring) -> Tensor:
    """Return the attention of a row to itself, [n, H, value size]."""
    num = q_nHD.shape[0]
    visible = None
    if 0 < scoring.window < num or scoring.cap:
        at = torch.arange(num, device=q_nHD.device)
        visible = _visible(at, num, scoring.window)
    return _attend_dense(q_nHD, k_nKD, v_nKD, visible, scoring)


class StepAttention:
    """The attention of one step's chunks, of all layers.

    Args:
        chunks: Of different rows, short ones first.
        cache: Their keys and values; those of the step are written to it.
        invariant: Whether a token's bits may not depend on its chunk: all are computed one by one.
    """

    def __init__(self, chunks: Sequence[Chunk], cache: KvCache, *, invariant: bool = False) -> None:
        self._cache = cache
        device = cache.device
        self._native = load_native() if device.type == "cpu" else None
        self._alone = invariant and self._native is None
        longest = 1 if self._native is None else _SHORT_TOKENS
        short = list(
            itertools.takewhile(lambda chunk: invariant or len(chunk.tokens) <= longest, chunks)
        )
        self.num_singles = sum(len(chunk.tokens) for chunk in short)
        self.spans: list[_Span] = []
        end = self.num_singles
        for chunk in chunks[len(short) :]:
            begin, end = end, end + len(chunk.tokens)
            self.spans.append(_Span(chunk, begin, end, device))
        slots = [slot for chunk in chunks for slot in get_slots(chunk)]
        self.slots_N = put(slots, device)
        if short:
            counts = [len(chunk.tokens) for chunk in short]
            lengths = [
                chunk.start + 1 + i
                for chunk, count in zip(short, counts, strict=True)
                for i in range(count)
            ]
            most = _num_blocks(max(lengths))
            tables = put([get_table(chunk, most) for chunk in short], device)
            if self.num_singles > len(short):
                tables = tables.repeat_interleave(put(counts, device), 0)
            self.tables = tables
            self.lengths_B = put(lengths, device)
            self._visible: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scoring: Scoring
    ) -> Tensor:
        """Store the step's keys and values and return its attention, [N, H, value size]."""
        self._cache.write(layer, self.slots_N, k_NKD, v_NKD)
        outputs = []
        if self.num_singles:
            outputs.append(self._attend_singles(layer, q_NHD[: self.num_singles], scoring))
        for span in self.spans:
            rows = slice(span.begin, span.end)
            outputs.append(
                self._attend_span(layer, span, q_NHD[rows], k_NKD[rows], v_NKD[rows], scoring)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_singles(self, layer: int, q_BHD: Tensor, scoring: Scoring) -> Tensor:
        if self._native is not None and self._native.takes(q_BHD):
            keys, values = self._cache.layer(layer)
            return self._native.attend(
                q_BHD,
                keys,
                values,
                self.tables,
                self.lengths_B,
                scale=scoring.scale,
                window=scoring.window,
                cap=scoring.cap,
            )
        if self._alone:
            return self._attend_alone(layer, q_BHD, scoring)
        k_BMKD, v_BMKD = self._cache.read(layer, self.tables)
        # The query heads of one key-value head stand as G queries: no key is repeated.
        q_BKGD = q_BHD.reshape(q_BHD.shape[0], k_BMKD.shape[2], -1, q_BHD.shape[2])
        out_BKGD = _scores_and_values(
            q_BKGD,
            k_BMKD.transpose(1, 2),
            v_BMKD.transpose(1, 2),
            self._visible_B11M(scoring.window),
            scoring,
        )
        return out_BKGD.reshape(q_BHD.shape[0], q_BHD.shape[1], -1)

    def _attend_alone(self, layer: int, q_BHD: Tensor, scoring: Scoring) -> Tensor:
        """Attend token by token, each over its own past and no padding."""
        outputs = []
        for q_HD, table, length in zip(q_BHD, self.tables, self.lengths_B.tolist(), strict=True):
            k_1MKD, v_1MKD = self._cache.read(layer, table[None, : _num_blocks(length)])
            begin = max(0, length - scoring.window) if scoring.window else 0
            k_MKD, v_MKD = k_1MKD[0, begin:length], v_1MKD[0, begin:length]
            visible_1M = torch.ones(1, length - begin, dtype=torch.bool, device=q_HD.device)
            outputs.append(_attend_dense(q_HD[None], k_MKD, v_MKD, visible_1M, scoring))
        return torch.cat(outputs)

    def _visible_B11M(self, window: int) -> Tensor:
        if window not in self._visible:
            visible_BM = _visible(self.lengths_B - 1, self.tables.shape[1] * BLOCK_TOKENS, window)
            self._visible[window] = visible_BM[:, None, None]
        return self._visible[window]

    def _attend_span(
        self,
        layer: int,
        span: _Span,
        q_nHD: Tensor,
        k_nKD: Tensor,
        v_nKD: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        if self._native is not None and self._native.attends_chunks(q_nHD):
            keys, values = self._cache.layer(layer)
            return self._native.attend_chunk(
                q_nHD,
                keys,
                values,
                span.table,
                span.start,
                scale=scoring.scale,
                window=scoring.window,
                cap=scoring.cap,
            )
        if not span.start:
            return attend_causally(q_nHD, k_nKD, v_nKD, scoring)
        k_1MKD, v_1MKD = self._cache.read(layer, span.table[None])
        visible = span.visible_nM(scoring.window)
        return _attend_dense(q_nHD, k_1MKD[0], v_1MKD[0], visible, scoring)


class _Span:
    """A chunk of several tokens at ``begin:end`` of the ragged row, and its row's blocks."""

    def __init__(self, chunk: Chunk, begin: int, end: int, device: torch.device) -> None:
        self.begin, self.end = begin, end
        self.start = chunk.start
        length = chunk.start + len(chunk.tokens)
        self._num_slots = _num_blocks(length) * BLOCK_TOKENS
        self.table = put(get_table(chunk, _num_blocks(length)), device)
        self._at_n = torch.arange(chunk.start, length, device=device)
        self._visible: dict[int, Tensor] = {}

    def visible_nM(self, window: int) -> Tensor:
        """Return which of the row's slots each token sees."""
        if window not in self._visible:
            self._visible[window] = _visible(self._at_n, self._num_slots, window)
        return self._visible[window]


def _visible(at_n: Tensor, num_slots: int, window: int) -> Tensor:
    """Return which of a row's slots the tokens at these positions see, [n, M]."""
    slots_M = torch.arange(num_slots, device=at_n.device)
    visible_nM = slots_M <= at_n[:, None]
    return visible_nM & (slots_M > at_n[:, None] - window) if window else visible_nM


def _attend_dense(
    q_nHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, visible_nM: Tensor | None, scoring: Scoring
) -> Tensor:
    if not scoring.cap:
        out_1HnD = F.scaled_dot_product_attention(
            q_nHD.transpose(0, 1)[None],
            k_MKD.transpose(0, 1)[None],
            v_MKD.transpose(0, 1)[None],
            attn_mask=visible_nM,
            is_causal=visible_nM is None,
            scale=scoring.scale,
            enable_gqa=True,
        )
        return out_1HnD[0].transpose(0, 1)
    num, num_heads, size = q_nHD.shape
    q_KGnD = q_nHD.transpose(0, 1).reshape(k_MKD.shape[1], -1, num, size)
    out_KGnD = _scores_and_values(
        q_KGnD,
        k_MKD.transpose(0, 1)[:, None],
        v_MKD.transpose(0, 1)[:, None],
        visible_nM,
        scoring,
    )
    return out_KGnD.reshape(num_heads, num, -1).transpose(0, 1)


def _scores_and_values(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scoring: Scoring
) -> Tensor:
    """Return attention over the last two dimensions, with soft-capped scores if wanted."""
    if not scoring.cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scoring.scale)
    scores = (q @ k.transpose(-1, -2)).float() * scoring.scale
    scores = torch.tanh(scores / scoring.cap) * scoring.cap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1).to(v.dtype) @ v


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def get_table(chunk: Chunk, length: int) -> list[int]:
    """Return so many of the chunk's blocks, block 0 standing for what it has not."""
    table = list(chunk.blocks[:length])
    return table + [0] * (length - len(table))


def get_slots(chunk: Chunk) -> list[int]:
    """Return where its tokens' keys and values go in the pool."""
    return [
        chunk.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
        for position in range(chunk.start, chunk.start + len(chunk.tokens))
    ]
