"""Low-rank changes count for their own tokens, and leave all others as they were, bit by bit.

The reference is transformers' model with the change added to its weights.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fabric.engine import lowrank
from fabric.engine.linear import pack_linears
from fabric.engine.lowrank import Factors, Span
from fabric.engine.probe import observe_layers, observe_linears
from fabric.engine.runner import Chunk, Runner
from fabric.errors import LowRankInvalid
from fabric.testing.families import FAMILIES

LONG = [(5 * i) % 250 for i in range(40)]
SHORT = [7, 8, 9, 10]


@pytest.fixture(params=["native kernel", "torch alone"])
def kernel(request, monkeypatch):
    if request.param == "torch alone":
        monkeypatch.setattr(lowrank, "load_native", lambda: None)


def runner_of(model, *, packed=False):
    layers, linears = observe_layers(model, name="tiny"), observe_linears(model)
    if packed:
        pack_linears(model)
    return Runner(model, layers, num_blocks=16, linears=linears)


def random_factors(sizes, seed, rank=4, size=0.2):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            down_RK=torch.randn(rank, s.num_inputs, generator=draw) * size,
            up_OR=torch.randn(s.num_outputs, rank, generator=draw) * size,
            scale=0.5,
        )
        for name, s in sizes.items()
    }


def merged(model, factors):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    for name, of in factors.items():
        module = model.get_submodule(name)
        change_OK = of.scale * of.up_OR @ of.down_RK
        change = change_OK.T if isinstance(module, Conv1D) else change_OK
        with torch.no_grad():
            module.weight += change.to(module.weight.dtype)
    return model


def prefill(ids, blocks, *deltas):
    return Chunk(tokens=ids, start=0, blocks=blocks, num_wanted=len(ids), deltas=deltas)


def next_token(ids, blocks):
    return Chunk(tokens=ids[-1:], start=len(ids) - 1, blocks=blocks, num_wanted=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_rows_are_those_of_merged_weights_and_the_others_keep_their_bits(family, kernel):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    runner = runner_of(model)
    changes = [random_factors(runner.lowrank.sizes, seed, rank) for seed, rank in ((1, 4), (2, 1))]
    deltas = [runner.lowrank.place(change) for change in changes]
    tables = [range(1, 4), range(4, 7), range(7, 10)]
    prompts = [SHORT, LONG, SHORT]
    changed = [(), deltas[:1], deltas[1:]]

    chunks = [prefill(ids, table) for ids, table in zip(prompts, tables, strict=True)]
    logits = runner.forward(with_deltas(chunks, changed)).split([len(ids) for ids in prompts])
    unchanged = runner.forward(chunks)
    assert torch.equal(logits[0], unchanged[: len(SHORT)])
    for i, change in enumerate(changes, 1):
        expected = logits_of(merged(model, change), prompts[i])
        torch.testing.assert_close(logits[i], expected, atol=2e-4, rtol=1e-4)
        assert (expected - logits_of(model, prompts[i])).abs().max() > 0.1  # it does something

    runner.forward(with_deltas(chunks, changed))
    longer = [[*ids, 11] for ids in prompts]
    chunks = [next_token(ids, table) for ids, table in zip(longer, tables, strict=True)]
    logits = runner.forward(with_deltas(chunks, changed))
    assert torch.equal(logits[0], runner.forward(chunks)[0])
    for i, change in enumerate(changes, 1):
        expected = logits_of(merged(model, change), longer[i])[-1]
        torch.testing.assert_close(logits[i], expected, atol=2e-4, rtol=1e-4)


def with_deltas(chunks, changed):
    pairs = zip(chunks, changed, strict=True)
    return [dataclasses.replace(chunk, deltas=tuple(deltas)) for chunk, deltas in pairs]


def logits_of(model, ids):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def test_deltas_of_one_token_add_up_in_any_overlap(tiny_llama, kernel):
    model = tiny_llama().eval()
    runner = runner_of(model)
    changes = [random_factors(runner.lowrank.sizes, seed) for seed in (1, 2)]
    deltas = [runner.lowrank.place(change) for change in changes]
    logits = runner.forward([prefill(SHORT, range(1, 4), *deltas)])
    both = merged(merged(model, changes[0]), changes[1])
    expected = logits_of(both, SHORT)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_packed_bfloat16_layers_take_deltas_too(tiny_llama, kernel):
    model = tiny_llama().bfloat16().eval()
    exact = copy.deepcopy(model).float()
    runner = runner_of(model, packed=True)
    change = random_factors(runner.lowrank.sizes, 1, size=0.1)
    delta = runner.lowrank.place(change)
    plain = prefill(SHORT, range(1, 4))
    mixed = runner.forward([plain, prefill(LONG, range(4, 8), delta)])
    unchanged = runner.forward([plain, prefill(LONG, range(4, 8))])
    assert torch.equal(mixed[: len(SHORT)], unchanged[: len(SHORT)])
    expected = logits_of(merged(exact, change), LONG)
    distance = (mixed[len(SHORT) :] - expected).norm() / expected.norm()
    moved = (expected - logits_of(exact, LONG)).norm() / expected.norm()
    assert distance < 0.03 < 0.1 < moved


def test_gradients_flow_through_a_delta(tiny_llama):
    model = tiny_llama().eval()
    sizes = observe_linears_of(model)
    layers = lowrank.LowRankLayers(model, sizes)
    change = random_factors(sizes, 1)
    expected = merged(model, change)
    gradients = []
    for which, spans in ((model, [Span(start=0, stop=4, delta=layers.place(change))]),
                         (expected, [])):  # fmt: skip
        which.set_attn_implementation("eager")
        x = model.get_input_embeddings()(torch.tensor([SHORT])).detach().requires_grad_()
        with layers.applied(spans):
            which(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-2, rtol=1e-3)


def observe_linears_of(model):
    observe_layers(model, name="tiny")
    return observe_linears(model)


def test_experts_and_the_output_layer_cannot_be_changed():
    torch.manual_seed(3)
    sizes = observe_linears_of(FAMILIES["mixtral"]().eval())
    assert {name.rpartition(".")[2] for name in sizes} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("name", "down", "up", "reason"),
    [
        ("lm_head", (4, 64), (259, 4), "no linear layer"),
        ("model.layers.9.self_attn.q_proj", (4, 64), (64, 4), "no linear layer"),
        ("model.layers.0.self_attn.q_proj", (4, 63), (64, 4), "shapes"),
        ("model.layers.0.self_attn.k_proj", (4, 64), (64, 4), "shapes"),
        ("model.layers.0.self_attn.q_proj", (4, 64), (64, 3), "shapes"),
        ("model.layers.0.self_attn.q_proj", (0, 64), (64, 0), "shapes"),
        ("model.layers.0.self_attn.q_proj", (64,), (64, 4), "shapes"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_layers_name(tiny_llama, name, down, up, reason):
    model = tiny_llama().eval()
    layers = lowrank.LowRankLayers(model, observe_linears_of(model))
    with pytest.raises(LowRankInvalid, match=reason) as caught:
        layers.place({name: Factors(down_RK=torch.zeros(down), up_OR=torch.zeros(up))})
    assert caught.value.detail["layer"] == name
