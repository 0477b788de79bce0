"""Overlays of one run's weights, parts of the stack, and gradients, against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from fabric.testing.families import FAMILIES

LOGITS = [{"op": "read", "at": "logits"}, {"op": "save", "name": "logits", "x": 0}]
ATTENTION = "model.layers.0.self_attn"


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def same(outcome, expected, tolerance=1e-4):
    assert outcome.end.type == "finished", outcome.end.failure.message
    for run, of_run in expected.items():
        assert outcome.saves.get(run, {}).keys() == of_run.saves.keys()
        for name, value in of_run.saves.items():
            found = outcome.saves[run][name]
            scale = max(1.0, float(value.abs().max()))
            assert found.shape == value.shape, (run, name)
            assert torch.allclose(found, value, atol=tolerance * scale), (run, name)


OVERLAYS = {
    "low rank": [{"kind": "lowrank", "weight": f"{ATTENTION}.o_proj.weight", "u": "u", "v": "v"}],
    "two of one layer": [
        {"kind": "lowrank", "weight": f"{ATTENTION}.o_proj.weight", "u": "u", "v": "v"},
        {"kind": "lowrank", "weight": f"{ATTENTION}.o_proj.weight", "u": "u2", "v": "v2",
         "alpha": -2.0},
    ],
    "scaled, then low rank": [
        {"kind": "scale", "weight": f"{ATTENTION}.q_proj.weight", "k": 0.5},
        {"kind": "lowrank", "weight": f"{ATTENTION}.q_proj.weight", "u": "u", "v": "v"},
    ],
    "rows of the unembedding": [
        {"kind": "rows", "weight": "lm_head.weight", "index": [3, 250], "x": "rows"}
    ],
    "rows of the embedding": [
        {"kind": "rows", "weight": "model.embed_tokens.weight", "index": [5, 9], "x": "rows"}
    ],
    "normalized": [{"kind": "normalize", "weight": "model.layers.1.mlp.down_proj.weight"}],
    "columns": [{"kind": "normalize", "weight": "model.layers.1.mlp.up_proj.weight", "axis": 0}],
    "a norm": [{"kind": "scale", "weight": "model.layers.0.input_layernorm.weight", "k": 2.0}],
}  # fmt: skip
CONSTANTS = {
    "u": rand(48, 2),
    "v": rand(48, 2, seed=2),
    "u2": rand(48, 1, seed=3),
    "v2": rand(48, 1, seed=4),
    "rows": rand(2, 48, seed=5),
}


@pytest.fixture(scope="module")
def overlaid(rig_of, program_of):
    """All overlays at once in one batch, each with a run of its own, and one run without."""
    rig = rig_of()
    runs = [{"id": "plain", "nodes": LOGITS, "gen": {"max_tokens": 4}}]
    for name, overlays in OVERLAYS.items():
        read = {"op": "weight.read", "name": overlays[0]["weight"], "index": [[0, 10]]}
        nodes = [*LOGITS, read, {"op": "save", "name": "weight", "x": 2}]
        run = {"id": name, "nodes": nodes, "overlays": overlays, "gen": {"max_tokens": 4}}
        runs.append(run)
    program = program_of(*runs, constants=CONSTANTS)
    return rig.run(program), rig.expect(program, CONSTANTS)


def test_overlays_change_their_own_run_as_the_changed_weights_would(overlaid):
    outcome, expected = overlaid
    same(outcome, expected)
    assert [outcome.tokens[i] for i in range(len(expected))] == [
        run.tokens for run in expected.values()
    ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_overlay_has_an_effect(name, overlaid):
    outcome, _ = overlaid
    difference = outcome.saves[name]["logits"][:7] - outcome.saves["plain"]["logits"][:7]
    assert float(difference.abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3, windows"])
def test_overlays_in_other_families(family, rig_of, program_of):
    rig = rig_of(family)
    shapes = rig.manifest.weights
    names = [n for n in shapes if ".1." in n and n.endswith("weight") and len(shapes[n]) == 2]
    names += [n for n in shapes if n.endswith(("wte.weight", "embed_tokens.weight"))]
    names += [n for n in shapes if "experts" in n][:1]
    runs = []
    for name in names:
        run = {"id": name, "nodes": LOGITS, "gen": {"max_tokens": 2}}
        runs.append({**run, "overlays": [{"kind": "scale", "weight": name, "k": 1.5}]})
    program = program_of(*runs)
    same(rig.run(program), rig.expect(program))


def test_conv1d_counts_outputs_as_rows(rig_of, program_of):
    rig = rig_of("gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    constants = {"u": rand(144, 2), "v": rand(48, 2, seed=2), "rows": rand(1, 48)}
    low = {"kind": "lowrank", "weight": name, "u": "u", "v": "v", "alpha": 3.0}
    rows = {"kind": "rows", "weight": name, "index": [100], "x": "rows"}
    program = program_of(
        {"id": "low", "nodes": LOGITS, "overlays": [low]},
        {"id": "rows", "nodes": LOGITS, "overlays": [rows]},
        constants=constants,
    )
    same(rig.run(program), rig.expect(program, constants))


def test_parts_of_the_stack_run_alone(rig_of, program_of):
    rig = rig_of("gemma3, windows")
    hidden = {"x": rand(7, 48)}
    read = [{"op": "read", "at": "layers.3.out"}, {"op": "save", "name": "h", "x": 0}]
    first = [{"op": "read", "at": "layers.1.out"}, {"op": "save", "name": "h", "x": 0}]
    runs = (
        {"id": "middle", "nodes": read, "start_at": {"layer": 2, "x": "x"}, "stop_at": 4},
        {"id": "lower", "nodes": first, "stop_at": 2},
        {"id": "upper", "nodes": LOGITS, "start_at": {"layer": 2, "x": "lower/h"}},
        {"id": "whole", "nodes": LOGITS},
    )
    program = program_of(*runs, constants=hidden)
    outcome = rig.run(program)
    same(outcome, rig.expect(program, hidden))
    assert torch.allclose(
        outcome.saves["upper"]["logits"], outcome.saves["whole"]["logits"], atol=1e-5
    )
    alone = program_of(runs[0], constants=hidden)
    same(rig.run(alone), rig.expect(alone, hidden))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3, windows", "mixtral"])
def test_layers_below_all_entries_do_not_run(family, rig_of, program_of, request):
    rig = rig_of(family)
    lower = {"id": "lower", "nodes": [{"op": "read", "at": "layers.0.out"},
                                      {"op": "save", "name": "h", "x": 0}]}  # fmt: skip
    whole = {"id": "whole", "nodes": LOGITS}
    uppers = [
        {"id": f"upper{i}", "nodes": LOGITS, "start_at": {"layer": 1, "x": "lower/h"},
         "gen": {"max_tokens": 1}}
        for i in range(3)
    ]  # fmt: skip
    outcome = rig.run(program_of(lower, whole, *uppers))
    numbered = [part for part in rig.model.modules() if hasattr(part, "layer_idx")]
    # A layer's own hooks are called though it is passed by: its attention's are not.
    inner = next(
        one for one in numbered if not any(hasattr(x, "layer_idx") for x in one.children())
    )
    kind = type(inner)
    ran = set()

    def seen(module, _):
        if type(module) is kind:
            ran.add(module.layer_idx)

    request.addfinalizer(register_module_forward_pre_hook(seen).remove)
    constants = {"h": outcome.saves["lower"]["h"]}
    entering = [{**run, "start_at": {"layer": 1, "x": "h"}} for run in uppers]
    alone = rig.run(program_of(*entering, constants=constants))
    assert ran == set(range(1, rig.manifest.num_layers))
    rig.run(program_of(whole))
    assert 0 in ran
    expected = outcome.saves["whole"]["logits"]
    for run in uppers:
        assert torch.allclose(outcome.saves[run["id"]]["logits"], expected, atol=1e-5)
        assert torch.allclose(alone.saves[run["id"]]["logits"], expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_every_point_equal_autograd_over_hooks(family, rig_of, program_of):
    rig = rig_of(family)
    # A router is held to small differences below.
    kept = ("sample", "moe.experts", "router")
    points = [point for point in rig.points() if not point.endswith(kept)]
    nodes = [{"op": "read", "at": "logits", "sel": {"pos": "last"}}]
    nodes.append({"op": "log_softmax", "x": 0})
    nodes.append({"op": "slice", "x": 1, "index": [0, 7]})
    for point in points:
        nodes.append({"op": "grad", "scalar": 2, "wrt": point})
        nodes.append({"op": "save", "name": point, "x": len(nodes) - 1})
    program = program_of({"nodes": nodes})
    outcome, expected = rig.run(program), rig.expect(program)
    same(outcome, expected)
    for point in ("embed.out", "layers.0.out", "layers.1.attn.z"):
        assert float(outcome.saves["r0"][point].abs().max()) > 1e-4, point


@pytest.mark.parametrize("family", ["llama", "gemma3, windows", "mixtral"])
def test_gradients_are_what_small_writes_do(family, rig_of, program_of):
    rig = rig_of(family)
    layer, step = "layers.0", 2e-3
    size = rig.manifest.points[_place(rig)].shape[-1]
    at = {"mid": (48,), "attn.k_rope": (2, size), "attn.head_out": (4, 48)}
    at |= {"moe.router": (4,)} if family == "mixtral" else {}
    constants = {name: rand(*shape) for name, shape in at.items()}
    scalar = [
        {"op": "read", "at": "logits", "sel": {"pos": "last"}},
        {"op": "log_softmax", "x": 0},
        {"op": "slice", "x": 1, "index": [0, 7]},
    ]
    runs = []
    for name in at:
        grad = {"op": "grad", "scalar": 2, "wrt": f"{layer}.{name}"}
        runs.append({"id": name, "nodes": [*scalar, grad, {"op": "save", "name": "g", "x": 3}]})
        for sign in (1, -1):
            write = {"op": "write", "at": f"{layer}.{name}", "x": 0, "mode": "add"}
            nodes = [{"op": "const", "name": name}, {**write, "alpha": sign * step}]
            nodes += [{**node, **({"x": node["x"] + 2} if "x" in node else {})} for node in scalar]
            nodes.append({"op": "save", "name": "f", "x": 4})
            runs.append({"id": f"{name} {sign}", "nodes": nodes})
    saves = rig.run(program_of(*runs, constants=constants)).saves
    for name in at:
        measured = float(saves[f"{name} 1"]["f"] - saves[f"{name} -1"]["f"]) / (2 * step)
        along = float((saves[name]["g"] * constants[name]).sum())
        assert along == pytest.approx(measured, rel=0.05, abs=5e-3), name


def _place(rig):
    return [spec.pattern for spec in rig.manifest.points].index("layers.{i}.attn.k_rope")


def test_gradients_see_the_runs_writes_and_overlays_and_other_runs(rig_of, program_of):
    rig = rig_of()
    constants = {"d": rand(48), "u": rand(48, 1), "v": rand(48, 1, seed=2)}
    clean = [{"op": "read", "at": "layers.0.out"}, {"op": "save", "name": "h", "x": 0}]
    nodes = [
        {"op": "saved", "run": "clean", "save": "h"},
        {"op": "const", "name": "d"},
        {"op": "read", "at": "layers.0.out"},
        {"op": "sub", "x": 0, "y": 2},
        {"op": "write", "at": "layers.0.out", "x": 1, "mode": "add", "sel": {"pos": [2]}},
        {"op": "write", "at": "layers.1.mid", "x": 1, "mode": "add", "sel": {"pos": [4]}},
        {"op": "read", "at": "logits", "sel": {"pos": "last"}},
        {"op": "slice", "x": 6, "index": [0, 7]},
        {"op": "grad", "scalar": 7, "wrt": "layers.0.out"},
        {"op": "mul", "x": 8, "y": 3},
        {"op": "save", "name": "attribution", "x": 9},
        {"op": "grad", "scalar": 7, "wrt": "layers.1.out", "sel": {"pos": [4, 6], "dims": [3, 1]}},
        {"op": "save", "name": "out", "x": 11},
        {"op": "save", "name": "logit", "x": 7},
    ]
    overlay = {"kind": "lowrank", "weight": f"{ATTENTION}.v_proj.weight", "u": "u24", "v": "v"}
    constants["u24"] = rand(24, 1)
    program = program_of(
        {"id": "corrupt", "nodes": nodes, "overlays": [overlay], "ids": [9, 8, 7, 6, 5, 4, 3]},
        {"id": "clean", "nodes": clean},
        constants=constants,
    )
    same(rig.run(program), rig.expect(program, constants))


def test_packed_weights_have_gradients_and_overlays_too(rig_of, program_of):
    torch.manual_seed(3)
    model = FAMILIES["llama"]().bfloat16().eval()
    rig = rig_of(model=model, dtype="bfloat16")
    nodes = [
        *LOGITS,
        {"op": "slice", "x": 0, "index": [-1, 7]},
        {"op": "grad", "scalar": 2, "wrt": "layers.0.out"},
        {"op": "save", "name": "g", "x": 3},
    ]
    overlays = OVERLAYS["scaled, then low rank"] + OVERLAYS["rows of the unembedding"]
    head = [{"op": "read", "at": "layers.0.attn.head_out"}, {"op": "save", "name": "h", "x": 0}]
    program = program_of(
        {"id": "grad", "nodes": nodes},
        {"id": "overlay", "nodes": LOGITS, "overlays": overlays},
        {"id": "heads", "nodes": head},
        constants=CONSTANTS,
    )
    outcome = rig.run(program)
    rig.model.float()
    expected = rig.expect(program, CONSTANTS)
    for run, of_run in expected.items():
        for name, value in of_run.saves.items():
            found = outcome.saves[run][name].float()
            assert float((found - value).norm() / value.norm()) < 0.1, (run, name)
