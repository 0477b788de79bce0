"""Bounds, calculated by hand."""

from __future__ import annotations

import dataclasses

import pytest

from fabric.planning import Device, Machine, ModelShape, Workload, known_shape
from fabric.planning.bounds import Bounds, get_bounds
from fabric.planning.split import get_split

WORK = Workload(dtype="bf16", context_tokens=32, batch=3, step_tokens=10)


def bounds_of(
    shape: ModelShape, device: Device, *, tensor: int, pipeline: int, per_node: int
) -> Bounds:
    machine = Machine(device=device, num_nodes=2, devices_per_node=per_node)
    split = get_split(shape, WORK, tensor=tensor, pipeline=pipeline)
    return get_bounds(shape, WORK, split, machine)


def test_one_device_decodes_as_fast_as_it_reads(tiny: ModelShape, slate: Device) -> None:
    bounds = bounds_of(tiny, slate, tensor=1, pipeline=1, per_node=1)
    weights, head, norms, cache = 2 * 576 * 2, 800 * 2, 40 * 2, 2 * 8 * 2 * 3 * 32
    step_s = (weights + head + norms + cache) / 1000
    assert bounds.decode_tokens_s == pytest.approx(3 / step_s)
    assert bounds.decode_tokens_s_row == pytest.approx(1 / step_s)
    assert bounds.decode_limit == "memory"
    assert bounds.decode_idle == pytest.approx(0)


def test_one_device_prefills_as_fast_as_it_multiplies(tiny: ModelShape, slate: Device) -> None:
    bounds = bounds_of(tiny, slate, tensor=1, pipeline=1, per_node=1)
    # Attention: 2 layers, 4 heads of 2 numbers for keys and as many for values, 32 x 33 / 2 pairs.
    multiply_adds = 2 * 576 * 32 + 800 + 2 * 16 * 528
    assert bounds.first_token_s == pytest.approx(2 * multiply_adds / 10_000)
    assert bounds.prefill_tokens_s == pytest.approx(32 / bounds.first_token_s)
    assert bounds.prefill_limit == "compute"


def test_a_tensor_group_reads_half_and_sums_twice_a_layer(tiny: ModelShape, slate: Device) -> None:
    bounds = bounds_of(tiny, slate, tensor=2, pipeline=1, per_node=2)
    read_s = (2 * 576 + 800 + 40 * 2 + 2 * 4 * 2 * 3 * 32) / 1000
    # Four all-reduces of 3 tokens x 8 numbers x 2 bytes; over two ranks a ring sends them once.
    link_s = 4 * 48 / 500
    assert bounds.decode_tokens_s == pytest.approx(3 / (read_s + link_s))


def test_stages_on_two_nodes_wait_for_the_network(tiny: ModelShape, slate: Device) -> None:
    bounds = bounds_of(tiny, slate, tensor=1, pipeline=2, per_node=1)
    # Three rows for two stages: groups of two rows.
    first_s = (576 * 2 + 16 * 2 + 8 * 2 * 2 * 32) / 1000 + 2 * 8 * 2 / 100
    last_s = (576 * 2 + 24 * 2 + 800 * 2 + 8 * 2 * 2 * 32) / 1000
    assert bounds.decode_tokens_s == pytest.approx(3 / (2 * last_s))
    assert bounds.decode_idle == pytest.approx(1 - (first_s + last_s) / (2 * last_s))
    # Four chunks of at most ten tokens: the last stage adds one chunk to the slower first one.
    first_s = 2 * (576 * 32 + 16 * 528) / 10_000 + 32 * 8 * 2 / 100
    last_s = 2 * (576 * 32 + 16 * 528 + 800) / 10_000
    assert bounds.first_token_s == pytest.approx(first_s + last_s / 4)
    assert bounds.prefill_tokens_s == pytest.approx(32 / first_s)


def test_stages_on_one_node_use_its_faster_links(tiny: ModelShape, slate: Device) -> None:
    apart = bounds_of(tiny, slate, tensor=1, pipeline=2, per_node=1)
    together = bounds_of(tiny, slate, tensor=1, pipeline=2, per_node=2)
    saved_s = 32 * 8 * 2 * (1 / 100 - 1 / 500)
    assert apart.first_token_s - together.first_token_s == pytest.approx(saved_s)


def test_a_row_alone_leaves_the_other_stages_idle(tiny: ModelShape, slate: Device) -> None:
    machine = Machine(device=slate, num_nodes=1, devices_per_node=2)
    work = dataclasses.replace(WORK, batch=1)
    split = get_split(tiny, work, tensor=1, pipeline=2)
    assert get_bounds(tiny, work, split, machine).decode_idle == pytest.approx(0.5)


def test_a_batch_touches_more_experts_than_a_token() -> None:
    layer = known_shape("Mixtral-8x7B").layers[0]
    assert layer.touched_experts(1) == pytest.approx(2)
    assert layer.touched_experts(3) == pytest.approx(8 * (1 - 0.75**3))
    assert layer.touched_experts(1000) == pytest.approx(8)
    assert known_shape("Llama-3-8B").layers[0].touched_experts(3) == 0
