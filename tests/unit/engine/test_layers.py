"""Layers that the kernels run whole compute, bit by bit, what their modules compute."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fabric.engine.attention import Chunk
from fabric.engine.fused import fuse
from fabric.engine.linear import pack_linears
from fabric.engine.lowrank import Delta, Factors
from fabric.engine.native import load_native
from fabric.engine.probe import observe_layers, observe_linears, reference_logits, verify_runner
from fabric.engine.programs.composition import Composition
from fabric.engine.programs.points import Points
from fabric.engine.programs.steady import Kept, Steady
from fabric.engine.programs.step import ProgramStep
from fabric.engine.runner import Runner
from fabric.engine.touches import TOUCHED

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
}
each_dtype = pytest.mark.parametrize(
    ("dtype", "int8"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "8 bits"],
)
TOKENS = [(7 * i * i + 3) % 128 for i in range(64)]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    assert load_native() is not None, "install a C compiler: the kernels are what is tested"


def get_runner(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, *, int8: bool = False
) -> Runner:
    """Return a runner over a random model that has run, so that its layers are known."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    layers, linears = observe_layers(model, name="random"), observe_linears(model)
    expected = reference_logits(model)
    pack_linears(model, int8=int8)
    fuse(model)
    runner = Runner(model, layers, num_blocks=16, linears=linears)
    verify_runner(runner, expected, name="random", int8=int8)
    return runner


def run_steps(runner: Runner) -> torch.Tensor:
    """Return the logits of prefill, decoding beside a prefill, and decoding of two rows."""
    one, other = (1, 2, 3), (4, 5)
    steps = [
        [Chunk(tokens=TOKENS[:40], start=0, blocks=one, num_wanted=40)],
        [
            Chunk(tokens=TOKENS[40:41], start=40, blocks=one, num_wanted=1),
            Chunk(tokens=TOKENS[10:29], start=0, blocks=other, num_wanted=19),
        ],
        [
            Chunk(tokens=TOKENS[41:42], start=41, blocks=one, num_wanted=1),
            Chunk(tokens=TOKENS[29:32], start=19, blocks=other, num_wanted=3),
        ],
    ]
    runner.cache.wipe((*one, *other))
    return torch.cat([runner.forward(chunks) for chunks in steps])


def count_calls(runner: Runner) -> list[str]:
    """Have the names of the attention modules that run noted; hooks would be noticed."""
    called: list[str] = []
    for layer in runner.model.model.layers:
        run = layer.self_attn.forward

        def note(*args, _run=run, _index=layer.self_attn.layer_idx, **named):
            called.append(_index)
            return _run(*args, **named)

        layer.self_attn.forward = note
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_have_the_bits_of_their_modules(family: str, dtype: torch.dtype) -> None:
    runner = get_runner(FAMILIES[family], dtype)
    whole = run_steps(runner)
    for layer in runner.model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    called = count_calls(runner)
    assert torch.equal(run_steps(runner), whole)
    assert len(called) == 3 * len(runner.model.model.layers)


def test_whole_layers_of_8_bits_have_the_bits_of_their_modules() -> None:
    runner = get_runner(FAMILIES["llama, biases"], torch.bfloat16, int8=True)
    whole = run_steps(runner)
    for layer in runner.model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    assert torch.equal(run_steps(runner), whole)


def test_only_layers_that_are_hooked_run_their_modules() -> None:
    runner = get_runner(FAMILIES["llama"])
    called, seen = count_calls(runner), []
    chunk = Chunk(tokens=TOKENS[:5], start=0, blocks=(1,), num_wanted=5)
    plain = runner.forward([chunk])
    assert called == []
    hook = runner.model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.shape)
    )
    assert torch.equal(runner.forward([chunk]), plain)
    assert called == [1]
    assert seen == [(1, 5, 64)]
    hook.remove()
    runner.forward([chunk])
    assert called == [1]


def test_a_hook_on_a_whole_layer_sees_and_changes_what_goes_through_it() -> None:
    runner = get_runner(FAMILIES["llama"])
    called, layer = count_calls(runner), runner.model.model.layers[1]
    chunk = Chunk(tokens=TOKENS[:5], start=0, blocks=(1,), num_wanted=5)
    plain = runner.forward([chunk])
    hook = layer.register_forward_hook(lambda _module, _inputs, output: output * 2)
    changed = runner.forward([chunk])
    assert called == []
    hook.remove()
    assert not torch.allclose(changed, plain)
    inside = layer.mlp.register_forward_hook(lambda *_: None)
    hook = layer.register_forward_hook(lambda _module, _inputs, output: output * 2)
    assert torch.equal(runner.forward([chunk]), changed)
    inside.remove()
    hook.remove()
    assert torch.equal(runner.forward([chunk]), plain)


def test_layers_with_other_lines_run_as_modules() -> None:
    runner = get_runner(Qwen3Config(**SIZES, head_dim=16))  # it norms queries and keys
    called = count_calls(runner)
    run_steps(runner)
    assert len(called) == 3 * len(runner.model.model.layers)


def test_a_step_that_fails_leaves_the_modules_as_they_were() -> None:
    runner = get_runner(FAMILIES["llama"])
    chunk = Chunk(tokens=TOKENS[:5], start=0, blocks=(1,), num_wanted=5)
    expected = runner.forward([chunk])

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    hook = runner.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        runner.forward([chunk])
    hook.remove()
    assert all("forward" not in layer.__dict__ for layer in runner.model.model.layers)
    assert torch.equal(runner.forward([chunk]), expected)


def compose(points: list[str], sizes: dict[str, tuple[int, ...]], dtype: torch.dtype):
    """Return what two runs do in all steps: one adds to every point, the other saves them all."""
    torch.manual_seed(4)
    adds = {at: torch.randn(*sizes[at]).to(dtype) for at in points if len(sizes[at]) == 1}
    saves, end = {}, 0
    for at in points:
        begin, end = end, end + math.prod(sizes[at])
        saves[at] = Kept({}, slice(begin, end), sizes[at])
    adding = Steady(adds=adds, saves={}, num_kept=0, dtype=dtype)
    return Composition({0: adding, 1: Steady(adds={}, saves=saves, num_kept=end, dtype=dtype)})


@each_dtype
def test_what_is_added_and_kept_inside_whole_layers_has_the_bits_of_hooks(dtype, int8) -> None:
    runner = get_runner(FAMILIES["llama"], dtype, int8=int8)
    model, points = runner.model, Points(runner.model)
    sizes = {
        spec.pattern.replace("{i}", "1"): spec.shape[1:]
        for spec in points.find()
        if spec.pattern.replace("{i}", "1") in points.hooked
    }
    inside = [point for point in sizes if point.startswith("layers.1.")]
    assert {point.removeprefix("layers.1.") for point in inside} == set(TOUCHED)
    chunks = [
        Chunk(tokens=TOKENS[40:41], start=0, blocks=(1,), num_wanted=1),
        Chunk(tokens=TOKENS[10:11], start=0, blocks=(2,), num_wanted=1),
        Chunk(tokens=TOKENS[20:21], start=0, blocks=(3,), num_wanted=1),
    ]
    plain = runner.forward(chunks)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        made = compose(list(sizes), sizes, dtype)
        logits = runner.forward(chunks, ProgramStep([], points, None, composition=made))
        return logits, made.rooms[1].numbers

    called = count_calls(runner)
    logits, kept = run()
    assert called == []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    by_hooks = run()
    assert len(called) == len(model.model.layers)
    assert torch.equal(logits, by_hooks[0])
    assert torch.equal(kept, by_hooks[1])
    assert torch.equal(logits[1:], plain[1:])
    assert not torch.allclose(logits[0], plain[0], atol=0.1)


def place(runner: Runner, *layers: str, rank: int) -> Delta:
    """Return random changes of the linear layers whose names end so."""
    return runner.lowrank.place(
        {
            name: Factors(
                down_RK=torch.randn(rank, size.num_inputs) / 8,
                up_OR=torch.randn(size.num_outputs, rank),
            )
            for name, size in runner.lowrank.sizes.items()
            if name.endswith(layers)
        }
    )


@each_dtype
def test_deltas_of_short_chunks_have_the_bits_of_modules_inside_whole_layers(dtype, int8) -> None:
    runner = get_runner(FAMILIES["llama, biases"], dtype, int8=int8)
    whole = place(runner, "proj", rank=5), place(runner, "q_proj", "down_proj", rank=2)
    deltas = [whole[:1], (), whole, whole[1:]]
    tokens = [TOKENS[:1], TOKENS[1:2], TOKENS[2:3], TOKENS[3:9]]
    chunks = [
        Chunk(tokens=some, start=0, blocks=(1 + i,), num_wanted=len(some), deltas=delta)
        for i, (some, delta) in enumerate(zip(tokens, deltas, strict=True))
    ]
    plain = runner.forward([dataclasses.replace(chunk, deltas=()) for chunk in chunks])
    called = count_calls(runner)
    changed = runner.forward(chunks)
    assert called == []
    for layer in runner.model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    assert torch.equal(runner.forward(chunks), changed)
    assert len(called) == len(runner.model.model.layers)
    for row in range(len(changed)):
        assert torch.equal(changed[row], plain[row]) == (row == 1)


def test_a_delta_of_a_long_chunk_has_its_step_run_modules() -> None:
    runner = get_runner(FAMILIES["llama"], torch.bfloat16)
    called, delta = count_calls(runner), place(runner, "proj", rank=3)
    runner.forward([Chunk(tokens=TOKENS[:30], start=0, blocks=(1, 2), num_wanted=1)])
    assert called == []
    chunk = Chunk(tokens=TOKENS[:30], start=0, blocks=(1, 2), num_wanted=1, deltas=(delta,))
    runner.forward([chunk])
    assert called == [0, 1, 2]
