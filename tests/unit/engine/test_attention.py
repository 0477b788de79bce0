"""The CPU's attention kernels against torch's, over paged pools in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fabric.engine.attention import Scoring
from fabric.engine.cache import BLOCK_TOKENS
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


class Past:
    """One row's keys and values, in blocks out of order among others' NaN."""

    def __init__(self, num_tokens: int, num_heads: int, size: int, value_size: int) -> None:
        torch.manual_seed(num_tokens)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        self.table = torch.randperm(POOL_BLOCKS)[:num_blocks]
        offsets = torch.arange(BLOCK_TOKENS)
        slots = (self.table[:, None] * BLOCK_TOKENS + offsets).flatten()[:num_tokens]
        shape = (POOL_BLOCKS * BLOCK_TOKENS, num_heads)
        self.keys = torch.full((*shape, size), torch.nan, dtype=torch.bfloat16)
        self.values = torch.full((*shape, value_size), torch.nan, dtype=torch.bfloat16)
        self.keys[slots] = torch.randn(num_tokens, num_heads, size).bfloat16()
        self.values[slots] = torch.randn(num_tokens, num_heads, value_size).bfloat16()
        self.slots = slots

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
    native, start, num, num_heads, num_kv, size, value_size, window, cap
) -> None:
    past = Past(start + num, num_kv, size, value_size)
    # As a model gives them: heads first.
    q_nHD = torch.randn(num_heads, num, size).bfloat16().transpose(0, 1)
    if not native.attends_chunks(q_nHD):
        pytest.skip("this processor does not multiply bfloat16")
    scoring = Scoring(scale=size**-0.5, window=window, cap=cap)
    options = {"scale": scoring.scale, "window": window, "cap": cap}
    out = native.attend_chunk(q_nHD, past.keys, past.values, past.table, start, **options)
    torch.testing.assert_close(
        out.double(), past.attended(q_nHD, start, scoring), rtol=0.02, atol=0.01
    )
    # However the row is cut, each token's bits are the same.
    parts = [
        native.attend_chunk(part, past.keys, past.values, past.table, start + at, **options)
        for at, part in zip(range(0, num, 7), q_nHD.split(7), strict=True)
    ]
    assert torch.equal(torch.cat(parts), out)


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


def test_a_token_that_is_not_a_number_spoils_no_other_row_of_its_chunk(native) -> None:
    past = Past(64, 1, 16, 16)
    q_nHD = torch.randn(64, 2, 16).bfloat16()
    if not native.attends_chunks(q_nHD):
        pytest.skip("this processor does not multiply bfloat16")
    q_nHD[5] = torch.nan
    out = native.attend_chunk(
        q_nHD, past.keys, past.values, past.table, 0, scale=0.25, window=0, cap=0.0
    )
    assert out[5].isnan().all()
    assert out.isnan().any(-1).any(-1).nonzero().tolist() == [[5]]
