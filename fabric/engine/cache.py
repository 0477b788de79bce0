"""A paged KV cache: one pool of cache blocks, one table of blocks for every row.

Shapes: T tokens of the pool, N tokens of a step, B rows, M tokens of a row (whole cache blocks),
K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


class CacheBlocks:
    """Which cache blocks are free, and by how many rows each one is held.

    Block 0 is never given out: tables are padded with it, and what it holds stays finite.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks, 0, -1))
        self._num_holders = [0] * (num_blocks + 1)
        self.num_blocks = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return ``count`` blocks, which the caller holds from now on."""
        assert count <= len(self._free), "the scheduler admits only what fits"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Let one more row hold these blocks, which must not be written any more."""
        for block in blocks:
            self._num_holders[block] += 1

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Let go of blocks; return those that nobody holds any more."""
        freed = []
        for block in blocks:
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                freed.append(block)
        self._free.extend(reversed(freed))
        return freed


class KvCache:
    """The keys and values of all layers, addressed by cache block.

    Args:
        layers: The shape of every layer's keys and values.
        num_blocks: Blocks that can be given out.
        dtype: Of keys and values.
    """

    def __init__(
        self, layers: Sequence[LayerShape], *, num_blocks: int, dtype: torch.dtype
    ) -> None:
        tokens = (num_blocks + 1) * BLOCK_TOKENS
        self._keys = [
            torch.zeros(tokens, layer.num_heads, layer.key_size, dtype=dtype) for layer in layers
        ]
        self._values = [
            torch.zeros(tokens, layer.num_heads, layer.value_size, dtype=dtype) for layer in layers
        ]

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
        index = torch.tensor(blocks, dtype=torch.long)
        for pool in (*self._keys, *self._values):
            pool.view(-1, BLOCK_TOKENS, *pool.shape[1:]).index_fill_(0, index, 0)
