"""Every point of every family, read and written, against the model with PyTorch hooks."""

from __future__ import annotations

import copy

import pytest
import torch

from fabric.testing.families import FAMILIES

NEW = 3


def close(actual, expected, tolerance=1e-5):
    """Equal to rounding, relative to the largest number."""
    scale = max(1.0, expected[expected.isfinite()].abs().max().item())
    same = (actual - expected).abs() <= tolerance * scale
    return actual.shape == expected.shape and bool((same | (actual == expected)).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_of_every_point_equal_hooks_in_prefill_and_decoding(family, rig_of, program_of):
    rig = rig_of(family)
    nodes = []
    for point in rig.points():
        nodes.append({"op": "read", "at": point})
        nodes.append({"op": "save", "name": point, "x": len(nodes) - 1})
    program = program_of({"nodes": nodes, "gen": {"max_tokens": NEW}, "ids": [3, 9] * 12})
    outcome, expected = rig.run(program), rig.expect(program)["r0"]
    assert outcome.end.type == "finished", outcome.end.failure.message
    assert outcome.tokens[0] == expected.tokens
    for point in rig.points():
        assert close(outcome.saves["r0"][point], expected.saves[point]), point
        assert outcome.positions["r0"].get(point) == expected.positions.get(point), point


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_what_only_saves_modules_outputs_and_adds_to_them_gives_the_same(
    family, rig_of, program_of
):
    rig = rig_of(family)
    points = [p for p in rig.points() if p.endswith(".out") and p.startswith("layers.")]
    runs = []
    for alpha in (0.0, 2.0):
        nodes = [{"op": "const", "name": "v"}]
        nodes += [{"op": "write", "at": "layers.0.in", "x": 0, "mode": "add", "alpha": alpha}]
        for point in points:
            nodes.append({"op": "read", "at": point})
            read = len(nodes) - 1
            nodes.append({"op": "save", "name": point, "x": read})
            nodes.append({"op": "save", "name": f"{point}.short", "x": read, "dtype": "bfloat16"})
        runs.append({"nodes": nodes, "gen": {"max_tokens": 6}})
    constants = {"v": torch.randn(rig.manifest.hidden)}
    program = program_of(*runs, constants=constants)
    outcome, expected = rig.run(program), rig.expect(program, constants)
    assert outcome.end.type == "finished", outcome.end.failure.message
    for i, name in enumerate(("r0", "r1")):
        assert outcome.tokens[i] == expected[name].tokens
        assert outcome.positions[name] == expected[name].positions
        for point in points:
            assert close(outcome.saves[name][point], expected[name].saves[point]), (name, point)
            short = outcome.saves[name][f"{point}.short"]
            assert torch.equal(short, outcome.saves[name][point].bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_at_every_point_change_the_logits_as_hooks_do(family, rig_of, program_of):
    rig = rig_of(family)
    torch.manual_seed(1)
    constants, runs = {}, [{"nodes": _logits([])}]
    for i, point in enumerate(rig.points(write=True)):
        if point == "sample" or point.endswith("router"):
            continue  # of their own, in test_nodes and below
        sel = {"pos": [2, 4, -1, len(PROMPT)]}
        if shape := _shape(rig, point):
            constants[f"x{i}"] = torch.randn(shape)
            write = {"op": "write", "at": point, "x": 0, "mode": "add", "alpha": 2.0, "sel": sel}
            nodes = [{"op": "const", "name": f"x{i}"}, write]
        else:
            sel["heads"] = [0]
            nodes = [{"op": "write", "at": point, "mode": "scale", "alpha": 0.3, "sel": sel}]
        runs.append({"id": point, "nodes": _logits(nodes), "gen": {"max_tokens": NEW}})
    program = program_of(*runs, constants=constants)
    outcome, expected = rig.run(program), rig.expect(program, constants)
    assert outcome.end.type == "finished", outcome.end.failure.message
    plain = outcome.saves["r0"]["logits"]
    for i, run in enumerate(runs):
        name = run.get("id", "r0")
        assert close(outcome.saves[name]["logits"], expected[name].saves["logits"], 1e-4), name
        if i:
            effect = (outcome.saves[name]["logits"][: len(PROMPT)] - plain).abs().max()
            assert effect > 1e-2, f"{name} changed nothing"
            assert outcome.tokens[i] == expected[name].tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe"])
def test_written_router_logits_choose_the_experts(family, rig_of, program_of):
    rig = rig_of(family)
    x = torch.tensor([3.0, -3.0, 0.0, 1.0])
    write = {"op": "write", "at": "layers.0.moe.router", "x": 0, "mode": "add"}
    nodes = [{"op": "const", "name": "x"}, {**write, "sel": {"pos": [1, 6]}},
             {"op": "read", "at": "layers.0.moe.experts"},
             {"op": "save", "name": "experts", "x": 2}]  # fmt: skip
    saves = rig.run(program_of({"nodes": _logits(nodes)}, constants={"x": x})).saves["r0"]
    model = copy.deepcopy(rig.model)
    chosen = []

    def route(gate, args, output):
        logits = output[0].clone()
        logits[[1, 6]] += x
        scores, ids = logits.softmax(-1).topk(2, -1)
        normalised = getattr(gate, "norm_topk_prob", True)
        chosen.append(ids)
        return logits, scores / scores.sum(-1, keepdim=True) if normalised else scores, ids

    model.model.layers[0].mlp.gate.register_forward_hook(route)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert torch.equal(saves["experts"], chosen[0])
    assert close(saves["logits"], expected, 1e-4)


PROMPT = [5, 6, 7, 8, 9, 10, 11]


def _logits(nodes):
    nodes = [*nodes, {"op": "read", "at": "logits"}]
    return [*nodes, {"op": "save", "name": "logits", "x": len(nodes) - 1}]


def _shape(rig, point):
    from fabric.programs import resolve

    spec = resolve(rig.manifest, point)
    return () if "S" in spec.shape else spec.shape[1:]
