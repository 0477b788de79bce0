"""What a rank holds, calculated by hand."""

from __future__ import annotations

import pytest

from fabric.errors import RequestInvalid
from fabric.planning import ModelShape, Workload, known_shape
from fabric.planning.memory import rank_memory
from fabric.planning.split import get_split, ranks_of

DEVICE_BYTES = 10_000


def get_work(dtype: str = "bf16", *, context_tokens: int = 32, batch: int = 3) -> Workload:
    return Workload(dtype=dtype, context_tokens=context_tokens, batch=batch, step_tokens=10)


def test_two_tensor_ranks_divide_matrices_and_copy_norms(tiny: ModelShape) -> None:
    split = get_split(tiny, get_work(), tensor=2, pipeline=1)
    first, second = ranks_of(tiny, get_work(), split, DEVICE_BYTES)
    # Half of two layers' 576 and of 800 at either end; norms: 16 in a layer and 8 after the last.
    assert first.owned_parameters == 576 + 800 + 40
    assert (second.owned_parameters, second.copied_parameters) == (576 + 800, 40)
    assert first.weight_bytes == second.weight_bytes == 2 * 1416
    # Two layers, one key and one value head of 2 numbers, 2 bytes, 3 rows of 32 tokens.
    assert first.cache_bytes == 2 * (2 * 2) * 2 * 3 * 32
    # 13 tokens: three streams of 8 and half of two inner widths of 16; logits of 3 rows.
    assert first.activation_bytes == 13 * (3 * 8 + 16) * 2 + 3 * 100 * 4
    assert first.reserve_bytes == 1000
    assert first.total_bytes == 2832 + 1536 + 2240 + 1000


@pytest.mark.parametrize(
    ("dtype", "weight_bytes"),
    [
        ("bf16", 2 * 2792),
        ("fp16", 2 * 2792),
        ("fp32", 4 * 2792),
        # 1152 numbers in matrices: 9 x 128 with a scale of 2 bytes each, or 4. The rest is 1640.
        ("int8", 1152 + 9 * 2 + 2 * 1640),
        ("int4", 1152 // 2 + 9 * 4 + 2 * 1640),
    ],
)
def test_weights_take_what_their_dtype_takes(
    tiny: ModelShape, dtype: str, weight_bytes: int
) -> None:
    rank = rank_memory(
        *(tiny, get_work(dtype), range(2)),
        **{"tensor": 1, "tensor_rank": 0, "stage": 0, "device_bytes": DEVICE_BYTES},
    )
    assert rank.weight_bytes == weight_bytes
    value_bytes = 4 if dtype == "fp32" else 2
    assert rank.cache_bytes == 2 * (2 * 4) * value_bytes * 3 * 32


def test_a_row_takes_whole_cache_blocks(tiny: ModelShape) -> None:
    assert get_work(context_tokens=33).cache_tokens == 3 * 48


def test_the_last_stage_holds_a_copy_of_a_tied_embedding() -> None:
    shape, work = known_shape("SmolLM2-135M"), get_work()
    split = get_split(shape, work, tensor=1, pipeline=3)
    ranks = ranks_of(shape, work, split, DEVICE_BYTES)
    assert [rank.copied_parameters for rank in ranks] == [0, 0, 49152 * 576]
    assert sum(rank.owned_parameters for rank in ranks) == 134_515_008


def test_every_rank_keeps_the_whole_latent_of_a_token() -> None:
    shape, work = known_shape("Kimi-K2"), get_work(batch=1, context_tokens=16)
    split = get_split(shape, work, tensor=8, pipeline=1)
    ranks = ranks_of(shape, work, split, DEVICE_BYTES)
    assert {rank.cache_bytes for rank in ranks} == {61 * 576 * 2 * 16}


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), True, "8", None, 10**10])
@pytest.mark.parametrize("param", ["context_tokens", "batch", "step_tokens"])
def test_what_counts_nothing_is_refused(param: str, value: object) -> None:
    numbers = {"context_tokens": 8, "batch": 8, "step_tokens": 8, param: value}
    with pytest.raises(RequestInvalid, match=param):
        Workload(dtype="bf16", **numbers)  # type: ignore[arg-type]


def test_an_unknown_dtype_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RequestInvalid, match="bf16, fp16, fp32, int8, int4"):
        get_work("fp4")
