"""Flex attention over the paged cache beside our own: the same numbers, and no block too few.

A GPU's kernels look at the blocks that a mask lists and at nothing else; torch's way on a CPU does
not read the lists, so they are held to what is seen by themselves.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention

from fabric.engine.attention import Chunk, Scoring, StepAttention
from fabric.engine.cache import BLOCK_TOKENS, KvCache, LayerShape
from fabric.engine.flex import FlexAttention, PagedRows

NUM_BLOCKS = 40
SHARED = (5, 9)
CHUNKS = [
    Chunk(tokens=[0], start=37, blocks=(*SHARED, 2), num_wanted=1),
    Chunk(tokens=[0], start=32, blocks=(*SHARED, 7), num_wanted=1),
    Chunk(tokens=[0], start=0, blocks=(30,), num_wanted=1),
    Chunk(tokens=[0], start=15, blocks=(33,), num_wanted=1),
    Chunk(tokens=[0] * 150, start=17, blocks=tuple(range(11, 22)), num_wanted=1),
    Chunk(tokens=[0] * 5, start=32, blocks=(*SHARED, 22), num_wanted=1),
    Chunk(tokens=[0] * 30, start=0, blocks=(24, 3), num_wanted=1),
]
HEADS = [(4, 2, 16), (4, 4, 32), (9, 3, 24)]
SCORINGS = [(0, 0.0), (1, 0.0), (8, 0.0), (100, 0.0), (0, 5.0), (20, 5.0)]
"""Window and cap; 0: none."""


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch compute all scores at once, without a compiler."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def random_cache(num_heads: int, size: int) -> KvCache:
    torch.manual_seed(3)
    layer = LayerShape(num_heads=num_heads, key_size=size, value_size=size)
    cache = KvCache([layer], num_blocks=NUM_BLOCKS, dtype=torch.float32)
    for pool in cache.layer(0):
        pool.normal_()
    return cache


@pytest.mark.parametrize(("window", "cap"), SCORINGS)
@pytest.mark.parametrize(("num_heads", "num_kv", "size"), HEADS)
def test_a_ragged_step_attends_as_the_cpus_kernels_do(num_heads, num_kv, size, window, cap) -> None:
    num = sum(len(chunk.tokens) for chunk in CHUNKS)
    scoring = Scoring(scale=size**-0.5, window=window, cap=cap)
    q, k, v = (torch.randn(num, heads, size) for heads in (num_heads, num_kv, num_kv))
    ours, flex = (
        kind(CHUNKS, cache)(0, q, k, v, scoring)
        for kind, cache in (
            (StepAttention, random_cache(num_kv, size)),
            (FlexAttention, random_cache(num_kv, size)),
        )
    )
    torch.testing.assert_close(flex, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 8, 16, 17, 100])
@pytest.mark.parametrize("num_tokens", [1, 128, 129, 300])
def test_a_mask_lists_just_the_blocks_that_are_seen(num_tokens, window) -> None:
    cache = random_cache(1, 16)
    starts = [0, 1, 15, 200]
    tables = torch.stack([torch.randperm(NUM_BLOCKS)[:34] + 1 for _ in starts])
    rows = PagedRows(cache, tables, torch.tensor(starts), num_tokens=num_tokens)
    mask = rows._mask(window)
    for row, start in enumerate(starts):
        at, slots = torch.arange(start, start + num_tokens), torch.arange(cache.num_slots)
        place = torch.full((NUM_BLOCKS + 1,), 10**6)
        place[tables[row]] = torch.arange(34)
        position = place[slots // BLOCK_TOKENS] * BLOCK_TOKENS + slots % BLOCK_TOKENS
        seen = (position <= at[:, None]) & (position > at[:, None] - (window or 10**6))
        told = mask.mask_mod(
            torch.tensor(row), torch.tensor(0), torch.arange(num_tokens)[:, None], slots
        )
        assert torch.equal(told, seen)
        of_blocks = seen.view(num_tokens, -1, BLOCK_TOKENS).any(-1)
        for group, queries in enumerate(of_blocks.split(128)):
            num = mask.kv_num_blocks[row, 0, group]
            listed = mask.kv_indices[row, 0, group, :num]
            assert sorted(listed.tolist()) == queries.any(0).nonzero()[:, 0].tolist()


def test_what_stands_behind_a_rows_own_blocks_is_not_read() -> None:
    cache = random_cache(2, 16)
    q = torch.randn(1, 4, 16)
    scoring = Scoring(scale=0.25)
    exact, stale = (
        PagedRows(cache, torch.tensor([table]), torch.tensor([20]), num_tokens=1)
        for table in ([5, 9, 0, 0], [5, 9, 5, 9])
    )
    assert torch.equal(exact.attend(0, q, scoring), stale.attend(0, q, scoring))
