"""Attention over the paged cache by torch's flex attention: keys are read where they lie.

A row's table of cache blocks is its block mask, so nothing is gathered. Of GPUs; on a CPU torch
computes the same from all scores, which is for tests.

Shapes: B rows of L tokens each, Q blocks of queries in a row, M blocks in a table, P blocks and
T tokens of the pool, N = B x L tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fabric.engine.attention import Chunk, Scoring, attend_causally, get_slots, get_table
from fabric.engine.cache import BLOCK_TOKENS, KvCache
from fabric.engine.device import put

_QUERIES = 128
"""Queries of a row that share a list of blocks; the kernels' tiles divide it."""

_OPTIONS = {"BLOCK_N": BLOCK_TOKENS}
"""The kernels' tiles of keys may not be larger than a cache block."""

_KERNELS = 128
"""The most that one process may make; past it torch would compute all scores."""

Mod = Callable[..., Tensor]


class FlexAttention:
    """The attention of one step's chunks, of all layers: ``StepAttention``'s place on a GPU.

    Args:
        chunks: Of different rows, short ones first.
        cache: Their keys and values; those of the step are written to it.
        invariant: Must be false: a token's bits depend on its chunk.
    """

    def __init__(self, chunks: Sequence[Chunk], cache: KvCache, *, invariant: bool = False) -> None:
        assert not invariant, "the kernels' order of sums depends on the batch"
        self._cache = cache
        device = cache.device
        self._slots_N = put([slot for chunk in chunks for slot in get_slots(chunk)], device)
        singles = list(itertools.takewhile(lambda chunk: len(chunk.tokens) == 1, chunks))
        groups = ([singles] if singles else []) + [[chunk] for chunk in chunks[len(singles) :]]
        self._groups: list[tuple[int, PagedRows | None]] = []
        for group in groups:
            num = len(group[0].tokens)
            # What begins a row sees nothing of the pool.
            rows = None if num > 1 and not group[0].start else _get_rows(group, num, cache)
            self._groups.append((num * len(group), rows))

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scoring: Scoring
    ) -> Tensor:
        """Store the step's keys and values and return its attention, [N, H, value size]."""
        self._cache.write(layer, self._slots_N, k_NKD, v_NKD)
        outputs, end = [], 0
        for num, rows in self._groups:
            begin, end = end, end + num
            q, k, v = (x[begin:end] for x in (q_NHD, k_NKD, v_NKD))
            outputs.append(
                attend_causally(q, k, v, scoring)
                if rows is None
                else rows.attend(layer, q, scoring)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _get_rows(group: Sequence[Chunk], num_tokens: int, cache: KvCache) -> PagedRows:
    last = max(chunk.start for chunk in group) + num_tokens - 1
    width = _up(last // BLOCK_TOKENS + 1)
    tables_BM = put([get_table(chunk, width) for chunk in group], cache.device)
    starts_B = put([chunk.start for chunk in group], cache.device)
    return PagedRows(cache, tables_BM, starts_B, num_tokens=num_tokens)


class PagedRows:
    """Rows with as many tokens each, and what each token sees of the pool.

    Nothing is read back from the device, so that a CUDA graph may hold all of it.

    Args:
        cache: Of keys and values; those of the rows' own tokens are there before ``attend``.
        tables_BM: Each row's cache blocks in their order, and anything after its last one.
        starts_B: The position of each row's first token.
        num_tokens: Of each row.
        fixed: Whether there are always as many rows and blocks, so that a kernel may be made for
            their numbers alone.
    """

    def __init__(
        self,
        cache: KvCache,
        tables_BM: Tensor,
        starts_B: Tensor,
        *,
        num_tokens: int,
        fixed: bool = False,
    ) -> None:
        self._cache = cache
        self._flex = _get_flex(cache.device.type, fixed)
        self._tables_BM, self._starts_B, self._num_tokens = tables_BM, starts_B, num_tokens
        self._num_slots = cache.num_slots
        ranks_M = torch.arange(tables_BM.shape[1], device=tables_BM.device)
        last_B1 = (starts_B[:, None] + num_tokens - 1) // BLOCK_TOKENS
        own_BM = ranks_M <= last_B1
        ranks_BP = tables_BM.new_full((len(tables_BM), self._num_slots // BLOCK_TOKENS), -1)
        # Block 0 is no row's, so that what does not count may go there.
        ranks_BP.scatter_(1, tables_BM * own_BM, torch.where(own_BM, ranks_M, -1))
        self._ranks_BP = ranks_BP
        """Where each block of the pool stands in each row's table; -1: nowhere."""
        self._masks: dict[int, BlockMask] = {}
        self._caps: dict[float, Mod] = {}

    def attend(self, layer: int, q_NHD: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention of the rows' tokens, one row after the other, [N, H, value size]."""
        keys_TKD, values_TKD = self._cache.layer(layer)
        q_BHLD = q_NHD.unflatten(0, (-1, self._num_tokens)).transpose(1, 2)
        out_BHLD = self._flex(
            q_BHLD,
            keys_TKD.transpose(0, 1)[None],
            values_TKD.transpose(0, 1)[None],
            score_mod=self._get_cap(scoring.cap),
            block_mask=self._mask(scoring.window),
            scale=scoring.scale,
            enable_gqa=q_NHD.shape[1] != keys_TKD.shape[1],
            kernel_options=_OPTIONS,
        )
        return out_BHLD.transpose(1, 2).flatten(0, 1)

    def _get_cap(self, cap: float) -> Mod | None:
        if cap and cap not in self._caps:
            self._caps[cap] = _get_cap(torch.full((), cap, device=self._starts_B.device))
        return self._caps.get(cap)

    def _mask(self, window: int) -> BlockMask:
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int) -> BlockMask:
        num_blocks_row = self._tables_BM.shape[1]
        device = self._tables_BM.device
        begins_Q = torch.arange(0, self._num_tokens, _QUERIES, device=device)
        firsts_BQ = self._starts_B[:, None] + begins_Q
        ends_BQ = self._starts_B[:, None] + (begins_Q + _QUERIES).clamp_max(self._num_tokens)
        lowest_BQ = (firsts_BQ - window + 1).clamp_min(0) // BLOCK_TOKENS * bool(window)
        num_BQ = (ends_BQ - 1) // BLOCK_TOKENS + 1 - lowest_BQ
        at_BQM = lowest_BQ[..., None] + torch.arange(num_blocks_row, device=device)
        blocks_BQM = (
            self._tables_BM[:, None]
            .expand(-1, len(begins_Q), -1)
            .gather(2, at_BQM.clamp_max(num_blocks_row - 1))
        )
        return BlockMask.from_kv_blocks(
            num_BQ[:, None].int(),
            blocks_BQM[:, None].int(),
            BLOCK_SIZE=(_QUERIES, BLOCK_TOKENS),
            mask_mod=_get_sight(self._ranks_BP, self._starts_B, window or self._num_slots),
            seq_lengths=(self._num_tokens, self._num_slots),
            compute_q_blocks=False,
        )


# What the functions below know is in tensors: of numbers torch would make kernels anew, or fail to.


def _get_sight(ranks_BP: Tensor, starts_B: Tensor, window: int) -> Mod:
    """Return what says whether a token of a row sees a slot of the pool."""
    reach = starts_B.new_full((), window)

    def sees(b: Tensor, _h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
        rank = ranks_BP[b, slot // BLOCK_TOKENS]
        at, now = rank * BLOCK_TOKENS + slot % BLOCK_TOKENS, starts_B[b] + q
        return (rank >= 0) & (at <= now) & (at > now - reach)

    return sees


def _get_cap(cap: Tensor) -> Mod:
    """Return what keeps scores under a number."""

    def under(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _slot: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return under


@functools.cache
def _get_flex(device: str, fixed: bool) -> Callable[..., Tensor]:
    """Return torch's function; for a GPU compiled, for fixed numbers of rows or for any.

    Only for a fixed number torch takes its kernel that divides a row's blocks among processors.
    """
    if device == "cpu":
        return flex_attention  # type: ignore[no-any-return]
    compiled = torch.compile(flex_attention, dynamic=not fixed, fullgraph=True)
    # One kernel for every size of batch and every window.
    return torch._dynamo.config.patch(recompile_limit=_KERNELS)(compiled)  # type: ignore[no-any-return]


def _up(num: int) -> int:
    """Return the next power of two, so that tables come in few widths."""
    return 1 << (num - 1).bit_length()
