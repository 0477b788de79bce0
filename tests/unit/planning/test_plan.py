"""Plans: they fit, they hold the whole model once, and refusals say what would fit."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fabric.errors import PlanImpossible, RequestInvalid, UnknownDevice
from fabric.planning import (
    DEVICES,
    KNOWN_MODELS,
    Device,
    ModelShape,
    Plan,
    find_device,
    get_plan,
    known_shape,
    shape_of,
)
from fabric.planning.split import divide_evenly, ranks_of

SMALL = st.integers(1, 4)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, share, head = draw(SMALL), draw(SMALL), draw(st.sampled_from([2, 4]))
    config = {
        "model_type": draw(st.sampled_from(["llama", "gemma2", "mixtral", "qwen3"])),
        "hidden_size": draw(st.integers(4, 40)),
        "num_hidden_layers": draw(st.integers(1, 9)),
        "num_attention_heads": kv_heads * share,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": draw(st.integers(4, 64)),
        "vocab_size": draw(st.integers(2, 300)),
        "max_position_embeddings": 64,
        "num_local_experts": draw(st.integers(2, 8)),
        "num_experts_per_tok": 2,
        "tie_word_embeddings": draw(st.booleans()),
    }
    return shape_of("drawn", config)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    memory_bytes=st.integers(2_000, 200_000),
    num_nodes=SMALL,
    per_node=st.integers(1, 8),
    dtype=st.sampled_from(["bf16", "fp32", "int8", "int4"]),
    batch=st.integers(1, 8),
)
def test_a_plan_fits_and_holds_the_model_once(
    shape: ModelShape, memory_bytes: int, num_nodes: int, per_node: int, dtype: str, batch: int
) -> None:
    device = dataclasses.replace(DEVICES["H200"], memory_bytes=memory_bytes)
    try:
        plan = get_plan(
            *(shape, device),
            num_nodes=num_nodes,
            devices_per_node=per_node,
            dtype=dtype,
            context_tokens=20,
            batch=batch,
            step_tokens=8,
        )
    except PlanImpossible:
        assume(False)
    assert all(rank.total_bytes <= memory_bytes for rank in plan.ranks)
    assert sum(rank.owned_parameters for rank in plan.ranks) == shape.parameters
    assert [index for layers in plan.split.stages for index in layers] == [
        *range(len(shape.layers))
    ]
    assert plan.num_copies * plan.split.num_ranks <= num_nodes * per_node
    assert plan.num_copies >= 1
    assert all(plan.node_of(rank) < num_nodes for rank in plan.ranks)
    assert plan.split.tensor <= per_node
    assert all(divisor % plan.split.tensor == 0 for divisor in shape.divisors)
    assert plan.max_batch >= batch
    assert 0 <= plan.bounds.decode_idle < 1
    assert plan.bounds.decode_tokens_s > 0
    assert not exceeds(plan, plan.max_batch)
    assert exceeds(plan, plan.max_batch + 1)


def exceeds(plan: Plan, batch: int) -> bool:
    work = dataclasses.replace(plan.work, batch=batch)
    room = plan.machine.device.memory_bytes
    ranks = ranks_of(plan.shape, work, plan.split, room)
    return max(rank.total_bytes for rank in ranks) > room


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_stages_are_as_even_as_can_be(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    ranges = divide_evenly(costs, parts)
    assert len(ranges) == parts
    assert all(ranges)
    assert [index for part in ranges for index in part] == [*range(len(costs))]
    cuts = itertools.combinations(range(1, len(costs)), parts - 1)
    best = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts
    )
    assert max(sum(costs[index] for index in part) for part in ranges) == best


def test_a_small_model_gets_a_copy_on_every_device() -> None:
    plan = get_plan(known_shape("Llama-3-8B"), find_device("H200"))
    assert (plan.split.tensor, plan.split.pipeline, plan.num_copies) == (1, 1, 8)
    assert plan.ranks[0].weight_bytes == 2 * 8_030_261_248
    # 32 layers, 8 heads of 128 for keys and values, 2 bytes, 16 rows of 8192 tokens.
    assert plan.ranks[0].cache_bytes == 32 * 2 * 8 * 128 * 2 * 16 * 8192


def test_a_large_model_is_divided_inside_a_node_first() -> None:
    plan = get_plan(known_shape("Llama-3-70B"), find_device("H100"))
    assert (plan.split.tensor, plan.split.pipeline, plan.num_copies) == (4, 1, 1)
    assert sum(rank.owned_parameters for rank in plan.ranks) == 70_553_706_496


def test_a_million_million_parameters_take_three_nodes_of_eight_h200() -> None:
    shape, device = known_shape("Kimi-K2"), find_device("h200")
    # 2.05 TB in bf16; sixteen devices have 2.26 TB, of which a tenth is reserved.
    with pytest.raises(PlanImpossible, match="--nodes 3"):
        get_plan(shape, device, num_nodes=2)
    plan = get_plan(shape, device, num_nodes=3)
    assert (plan.split.tensor, plan.split.pipeline) == (8, 3)
    assert [plan.node_of(rank) for rank in plan.ranks] == [0] * 8 + [1] * 8 + [2] * 8
    assert sum(rank.owned_parameters for rank in plan.ranks) == shape.parameters
    assert any("latent" in warning for warning in plan.warnings)
    assert any("no tensor group in a node" in reason for reason in plan.reasons)


def test_a_tensor_group_is_never_larger_than_the_key_value_heads() -> None:
    device = dataclasses.replace(find_device("H200"), memory_bytes=450 * 10**6)
    shape = known_shape("Gemma-3-270M")  # one key-value head
    plan = get_plan(shape, device, context_tokens=2048, batch=4, step_tokens=256)
    assert plan.split.tensor == 1
    assert plan.split.pipeline > 1


def test_thin_experts_stay_whole() -> None:
    plan = get_plan(known_shape("Qwen3-30B-A3B"), find_device("A100-40"))
    assert plan.split.tensor == 4
    assert plan.split.experts == "whole"  # 768 / 4 = 192 numbers wide
    plan = get_plan(known_shape("Mixtral-8x7B"), find_device("A100-40"))
    assert plan.split.experts == "divided"


def test_idle_devices_are_named() -> None:
    plan = get_plan(known_shape("Llama-3-70B"), find_device("H100"), devices_per_node=5)
    assert plan.split.num_ranks == 4
    assert any(warning.startswith("1 of 5 devices stay idle") for warning in plan.warnings)
    assert not get_plan(known_shape("Llama-3-70B"), find_device("H100")).warnings


def test_what_a_refusal_offers_does_fit() -> None:
    shape, device = known_shape("Llama-3-70B"), find_device("A100-40")
    with pytest.raises(PlanImpossible) as caught:
        get_plan(shape, device, batch=64)
    message = caught.value.message
    [nodes] = map(int, re.findall(r"--nodes (\d+)", message))
    assert get_plan(shape, device, batch=64, num_nodes=nodes).num_nodes == nodes
    with pytest.raises(PlanImpossible) as caught:
        get_plan(shape, device, batch=64, num_nodes=nodes - 1)
    [batch] = map(int, re.findall(r"--batch (\d+)", caught.value.message))
    assert get_plan(shape, device, batch=batch, num_nodes=nodes - 1)
    with pytest.raises(PlanImpossible):
        get_plan(shape, device, batch=batch + 1, num_nodes=nodes - 1)
    [others] = re.findall(r"nodes? of ([^.]*)", message)
    for name in others.split(", "):
        assert get_plan(shape, find_device(name), batch=64)
    assert {"A100-40"}.isdisjoint(others.split(", "))


def test_a_smaller_dtype_is_offered_where_it_helps() -> None:
    shape, device = known_shape("Llama-3-70B"), find_device("A100-40")
    with pytest.raises(PlanImpossible, match="--dtype int8"):
        get_plan(shape, device)
    assert get_plan(shape, device, dtype="int8")


def test_absurdly_many_devices_are_planned_for_at_once() -> None:
    plan = get_plan(
        *(known_shape("Llama-3-8B"), find_device("H200")),
        num_nodes=10**9,
        devices_per_node=10**9,
        batch=1,
    )
    assert plan.num_copies == 10**18


def test_nothing_fits_where_one_layer_is_too_large() -> None:
    pebble = dataclasses.replace(find_device("H200"), name="pebble", memory_bytes=1000)
    with pytest.raises(PlanImpossible) as caught:
        get_plan(known_shape("Llama-3-8B"), pebble)
    assert not any("--nodes" in remedy for remedy in caught.value.detail["remedies"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"num_nodes": 0},
        {"num_nodes": float("nan")},
        {"devices_per_node": -1},
        {"devices_per_node": 2.5},
        {"devices_per_node": 10**12},
        {"batch": True},
        {"context_tokens": 8193},
        {"dtype": "fp8"},
    ],
)
def test_bad_numbers_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(RequestInvalid, match=next(iter(options))):
        get_plan(known_shape("Llama-3-8B"), find_device("H200"), **options)  # type: ignore[arg-type]


def test_an_unknown_device_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownDevice, match=r"did you mean H200\?"):
        find_device("H20")
    with pytest.raises(UnknownDevice, match="known devices: H200"):
        find_device("abacus")


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_model_has_a_plan(name: str) -> None:
    plan = get_plan(known_shape(name), find_device("A100-80"), num_nodes=64, batch=1)
    assert sum(rank.owned_parameters for rank in plan.ranks) == plan.shape.parameters


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_device_says_where_its_figures_come_from(device: Device) -> None:
    assert len(device.source) > 20
    assert device.flops["bf16"] >= device.flops["fp32"] > 0
    assert 1e9 < device.memory_bytes < 1e12
    assert device.link_bytes_s >= device.network_bytes_s
