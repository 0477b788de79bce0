"""Cache blocks are held, shared and freed; what a row reads is what it wrote."""

from __future__ import annotations

import pytest
import torch

from fabric.engine.cache import BLOCK_TOKENS, CacheBlocks, KvCache, LayerShape


def test_blocks_return_when_their_last_holder_lets_go():
    blocks = CacheBlocks(4)
    first, second = blocks.take(2), blocks.take(2)
    assert sorted(first + second) == [1, 2, 3, 4]
    blocks.share(first)
    assert blocks.release(first) == []
    assert blocks.num_free == 0
    assert blocks.release(first) == first
    assert blocks.num_free == 2
    with pytest.raises(AssertionError):
        blocks.take(3)


def test_rows_read_what_they_wrote_and_zeros_after_a_wipe():
    layers = [LayerShape(num_heads=2, key_size=3, value_size=5)] * 2
    cache = KvCache(layers, num_blocks=6, dtype=torch.float32)
    tables = [[5, 2], [1, 4]]
    written = []
    for table in tables:
        slots = [block * BLOCK_TOKENS + i for block in table for i in range(BLOCK_TOKENS)]
        keys, values = torch.randn(32, 2, 3), torch.randn(32, 2, 5)
        cache.write(1, torch.tensor(slots), keys, values)
        written.append((keys, values))
    keys, values = cache.read(1, torch.tensor(tables))
    assert keys.equal(torch.stack([k for k, _ in written]))
    assert values.equal(torch.stack([v for _, v in written]))
    assert not cache.read(0, torch.tensor(tables))[0].any()

    cache.copy_block(2, 6)
    assert cache.read(1, torch.tensor([[6]]))[1][0].equal(written[0][1][BLOCK_TOKENS:])
    cache.wipe([5, 2])
    keys, values = cache.read(1, torch.tensor(tables))
    assert not keys[0].any()
    assert keys[1].equal(written[1][0])
