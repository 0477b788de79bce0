"""A paged KV cache: one pool of cache blocks, one table of blocks for every row.

Shapes: T tokens of the pool, N tokens of a step, B rows, M tokens of a row (whole cache blocks),
K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.engine.device import CPU, put

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer keeps of a token."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def num_values(self) -> int:
        """Numbers kept per token."""
        return self.num_heads * (self.key_size + self.value_size)


class KvCache:
    """The keys and values of all layers, addressed by cache block.

    Args:
        layers: The shape of every layer's keys and values.
        num_blocks: Blocks that can be given out.
        dtype: Of keys and values.
        device: Where they are; the CPU if not given.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.num_slots = (num_blocks + 1) * BLOCK_TOKENS
        """Tokens of the pool."""
        self.device = device or CPU

        def pool(num_heads: int, size: int) -> Tensor:
            return torch.zeros(self.num_slots, num_heads, size, dtype=dtype, device=self.device)

        self._keys = [pool(layer.num_heads, layer.key_size) for layer in layers]
        self._values = [pool(layer.num_heads, layer.value_size) for layer in layers]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the pools of keys and of values of one layer, each [T, K, D]."""
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, slots_N: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """Store the keys and values of N tokens; a slot is block x ``BLOCK_TOKENS`` + offset."""
        self._keys[layer].index_copy_(0, slots_N, k_NKD)
        self._values[layer].index_copy_(0, slots_N, v_NKD)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of rows whose tables are ``blocks`` [B, M / BLOCK_TOKENS].

        Returns:
            Keys and values, each [B, M, K, D] in the cache's dtype.
        """
        return self._gather(self._keys[layer], blocks), self._gather(self._values[layer], blocks)

    @staticmethod
    def _gather(pool_TKD: Tensor, blocks: Tensor) -> Tensor:
        # Whole blocks are contiguous, so this copies memory in long runs.
        paged = pool_TKD.view(-1, BLOCK_TOKENS * pool_TKD.shape[1] * pool_TKD.shape[2])
        rows = paged.index_select(0, blocks.flatten())
        return rows.view(blocks.shape[0], -1, pool_TKD.shape[1], pool_TKD.shape[2])

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers."""
        for pool in (*self._keys, *self._values):
            paged = pool.view(-1, BLOCK_TOKENS, *pool.shape[1:])
            paged[target] = paged[source]

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zero blocks: a masked NaN left behind would still spoil the next row's attention."""
        index = put(blocks, self.device, torch.long)
        for pool in (*self._keys, *self._values):
            pool.view(-1, BLOCK_TOKENS, *pool.shape[1:]).index_fill_(0, index, 0)
