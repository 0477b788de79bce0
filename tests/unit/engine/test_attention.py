"""Attention against its definition, by the CPU's kernels and by torch, over pools in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fabric.engine.attention import Chunk, Scoring, StepAttention
from fabric.engine.cache import BLOCK_TOKENS, KvCache, LayerShape
from fabric.engine.native import Native, load_native

POOL_BLOCKS = 64
HEADS = [(9, 3, 64, 64), (4, 4, 16, 16), (4, 1, 128, 128), (8, 2, 24, 40)]
"""Query heads, key-value heads, head size and value size."""

SCORINGS = [(0, 0.0), (20, 0.0), (40, 5.0)]
"""Window and cap; 0: none."""


@pytest.fixture(scope="module")
def native() -> Native:
    kernels = load_native()
    assert kernels is not None
    return kernels


def multiplies(kernels: Native | None, q_nHD: Tensor) -> bool:
    return kernels is not None and kernels.attends_chunks(q_nHD)


def unseen(kernels: Native | None, q_nHD: Tensor) -> float:
    """Return what stands where nobody looks.

    Torch multiplies it by zero, so there it is a number: the engine wipes what is none.
    """
    return torch.nan if multiplies(kernels, q_nHD) else 3e4


class Past:
    """One row's keys and values, in blocks out of order among others' NaN."""

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        size: int,
        value_size: int,
        unseen: float = torch.nan,
    ) -> None:
        torch.manual_seed(num_tokens)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        self.table = torch.randperm(POOL_BLOCKS)[:num_blocks]
        offsets = torch.arange(BLOCK_TOKENS)
        own = (self.table[:, None] * BLOCK_TOKENS + offsets).flatten()
        self.slots = own[:num_tokens]
        layer = LayerShape(num_heads=num_heads, key_size=size, value_size=value_size)
        self.cache = KvCache([layer], num_blocks=POOL_BLOCKS - 1, dtype=torch.bfloat16)
        self.keys, self.values = self.cache.layer(0)
        for pool in (self.keys, self.values):
            pool.fill_(torch.nan)
            pool[own] = unseen
            pool[self.slots] = torch.randn(num_tokens, *pool.shape[1:]).bfloat16()

    def attend(
        self, q_nHD: Tensor, start: int, scoring: Scoring, *, invariant: bool = False
    ) -> Tensor:
        """Return what a step gives for the tokens from ``start`` on, which it writes itself."""
        own = self.slots[start : start + len(q_nHD)]
        k_nKD, v_nKD = self.keys[own], self.values[own]
        self.keys[own], self.values[own] = torch.nan, torch.nan
        chunk = Chunk(tokens=[0] * len(own), start=start, blocks=self.table.tolist(), num_wanted=1)
        step = StepAttention([chunk], self.cache, invariant=invariant)
        return step(0, q_nHD, k_nKD, v_nKD, scoring)

    def attended(self, q_nHD: Tensor, start: int, scoring: Scoring) -> Tensor:
        """Return what the definition gives in float64, [n, H, value size]."""
        group = q_nHD.shape[1] // self.keys.shape[1]
        keys = self.keys[self.slots].double().repeat_interleave(group, 1)
        values = self.values[self.slots].double().repeat_interleave(group, 1)
        scores = torch.einsum("nhd,mhd->hnm", q_nHD.double(), keys) * scoring.scale
        if scoring.cap:
            scores = torch.tanh(scores / scoring.cap) * scoring.cap
        at_n = torch.arange(start, start + len(q_nHD))[:, None]
        at_m = torch.arange(len(keys))
        hidden = (at_m > at_n) | ((at_m <= at_n - scoring.window) & (scoring.window > 0))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, values)


@pytest.mark.parametrize(("window", "cap"), SCORINGS)
@pytest.mark.parametrize(("num_heads", "num_kv", "size", "value_size"), HEADS)
@pytest.mark.parametrize(("start", "num"), [(0, 17), (0, 64), (100, 33), (31, 1), (555, 129)])
def test_a_chunk_attends_to_its_past_and_to_itself(
    kernels, start, num, num_heads, num_kv, size, value_size, window, cap
) -> None:
    # As a model gives them: heads first.
    q_nHD = torch.randn(num_heads, num, size).bfloat16().transpose(0, 1)
    past = Past(start + num, num_kv, size, value_size, unseen(kernels, q_nHD))
    scoring = Scoring(scale=size**-0.5, window=window, cap=cap)
    out = past.attend(q_nHD, start, scoring)
    torch.testing.assert_close(
        out.double(), past.attended(q_nHD, start, scoring), rtol=0.02, atol=0.01
    )


@pytest.mark.parametrize(("window", "cap"), SCORINGS)
@pytest.mark.parametrize(("num_heads", "num_kv", "size", "value_size"), HEADS)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(("start", "num"), [(0, 63), (100, 42), (555, 147)])
def test_however_a_row_is_cut_each_token_attends_alike(
    kernels, start, num, invariant, num_heads, num_kv, size, value_size, window, cap
) -> None:
    q_nHD = torch.randn(num, num_heads, size).bfloat16()
    past = Past(start + num, num_kv, size, value_size, unseen(kernels, q_nHD))
    scoring = Scoring(scale=size**-0.5, window=window, cap=cap)
    whole = past.attend(q_nHD, start, scoring, invariant=invariant)
    parts = [
        past.attend(part, start + at, scoring, invariant=invariant)
        for at, part in zip(range(0, num, 21), q_nHD.split(21), strict=True)
    ]
    # Torch's own products may round by how many are computed at once.
    exact = invariant or multiplies(kernels, q_nHD)
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(torch.cat(parts), whole, **tolerance)


@pytest.mark.parametrize(("window", "cap"), SCORINGS)
@pytest.mark.parametrize(("num_heads", "num_kv", "size", "value_size"), HEADS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decoding_row_attends_to_its_past(
    native, dtype, length, num_heads, num_kv, size, value_size, window, cap
) -> None:
    past = Past(length, num_kv, size, value_size)
    q_BHD = torch.randn(1, num_heads, size).bfloat16()
    scoring = Scoring(scale=size**-0.5, window=window, cap=cap)
    out = native.attend(
        q_BHD.to(dtype),
        past.keys.to(dtype),
        past.values.to(dtype),
        past.table[None],
        torch.tensor([length]),
        scale=scoring.scale,
        window=window,
        cap=cap,
    )
    tolerance = {"rtol": 0.02, "atol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(
        out.double(),
        past.attended(q_BHD, length - 1, scoring),
        check_dtype=False,
        **(tolerance or {"rtol": 1e-5, "atol": 1e-5}),
    )


def test_a_token_that_is_not_a_number_spoils_no_other_row_of_its_chunk(kernels) -> None:
    q_nHD = torch.randn(64, 2, 16).bfloat16()
    q_nHD[5] = torch.nan
    out = Past(64, 1, 16, 16).attend(q_nHD, 0, Scoring(scale=0.25))
    assert out[5].isnan().all()
    assert out.isnan().any(-1).any(-1).nonzero().tolist() == [[5]]
