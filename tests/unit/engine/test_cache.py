"""Cache blocks are held, shared and freed; what a row reads is what it wrote."""

from __future__ import annotations

import pytest
import torch

from fabric.engine.blocks import CacheBlocks, PrefixKey, next_name
from fabric.engine.cache import BLOCK_TOKENS, KvCache, LayerShape


def test_blocks_return_when_their_last_holder_lets_go():
    blocks = CacheBlocks(4)
    first, second = blocks.take(2), blocks.take(2)
    assert sorted(first + second) == [1, 2, 3, 4]
    blocks.share(first)
    assert blocks.release(first) == []
    assert blocks.num_free == 0
    assert sorted(blocks.release(first)) == sorted(first)
    assert blocks.num_free == 2
    with pytest.raises(AssertionError):
        blocks.take(3)


def chain(start, num_blocks, token=1):
    names = [start]
    for i in range(num_blocks):
        names.append(next_name(names[-1], [token + i] * BLOCK_TOKENS))
    return names[1:]


def test_names_tell_tenants_variants_and_histories_apart():
    key = PrefixKey()
    starts = [
        key.start("a"),
        key.start("b"),
        key.start("a", variant="lora"),
        key.start("al", variant="ora"),
    ]
    assert len(set(starts)) == 4
    assert key.start("a") == starts[0]
    assert PrefixKey().start("a") != starts[0]
    assert chain(starts[0], 3) == chain(starts[0], 3)
    assert chain(starts[0], 3)[2] != next_name(starts[0], [3] * BLOCK_TOKENS)


def test_named_blocks_are_kept_until_room_is_needed_longest_unused_first():
    blocks = CacheBlocks(4)
    names = chain(b"x", 3)
    held = blocks.take(3)
    for block, name in zip(held, names, strict=True):
        blocks.name(block, name)
    assert blocks.release(held) == []
    assert (blocks.num_free, blocks.num_kept) == (4, 3)
    assert blocks.num_findable(names) == (3, 3)

    again = blocks.find(names[:2])
    assert again == held[:2]
    assert (blocks.num_free, blocks.num_kept) == (2, 1)
    blocks.release(again)
    blocks.take(2)  # the empty one, then the end of the chain, which was used longest ago
    assert blocks.find(names) == held[:2]
    assert blocks.num_free == 0
    assert (blocks.num_queried_tokens, blocks.num_found_tokens) == (80, 64)


def test_discarded_blocks_are_found_by_nobody():
    blocks = CacheBlocks(2)
    (name,) = chain(b"x", 1)
    held = blocks.take(1)
    blocks.name(held[0], name)
    other = blocks.find([name])
    assert blocks.discard(held) == []
    assert blocks.find([name]) == []
    assert blocks.discard(other) == held
    assert blocks.num_free == 2


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
