"""What runs do in every step of decoding alike is done without asking their nodes; as ever."""

from __future__ import annotations

import pytest
import torch

from fabric.engine.programs import execution
from fabric.engine.programs.execution import Execution


@pytest.fixture(scope="module")
def constants():
    torch.manual_seed(8)
    return {"v": torch.randn(48), "w": torch.randn(48), "one": torch.tensor([0.7])}


def add(at, name="v", **how):
    return [{"op": "const", "name": name}, {"op": "write", "at": at, "x": 0, "mode": "add", **how}]


def save(*points, dtype=None, reduce=None):
    nodes = [{"op": "read", "at": at} for at in points]
    return nodes + [
        {"op": "save", "name": at, "x": i, "dtype": dtype, "reduce": reduce}
        for i, at in enumerate(points)
    ]


def same(outcome, expected):
    assert outcome.end.type == "finished", outcome.end.failure.message
    for i, (run, of_run) in enumerate(expected.items()):
        assert outcome.tokens[i] == of_run.tokens, run
        assert outcome.positions.get(run, {}) == of_run.positions
        for name, value in of_run.saves.items():
            found = outcome.saves[run][name]
            assert found.dtype == value.dtype
            tolerance = 2e-2 if value.dtype == torch.bfloat16 else 1e-4
            assert torch.allclose(found, value, atol=tolerance, rtol=tolerance), (run, name)


@pytest.fixture
def visited(monkeypatch):
    """The positions of steps in which nodes of runs were evaluated, by run."""
    seen: dict[str, list[int]] = {}
    begin = Execution.begin

    def note(execution, start, count):
        seen.setdefault(execution.run.id, []).append(start)
        return begin(execution, start, count)

    monkeypatch.setattr(Execution, "begin", note)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma3, windows", "gpt2"])
def test_runs_that_come_and_go_add_and_save_their_own(
    family, rig_of, program_of, constants, visited
):
    rig = rig_of(family)
    nodes = [
        add("layers.0.out", alpha=6.0),
        save("layers.0.attn.q", "layers.0.mlp.act", "layers.1.out"),
        [],
        add("layers.1.attn.out", "w", alpha=-3.0),
        save("layers.0.in", dtype="bfloat16"),
        add("layers.0.in", "one"),
        save("embed.out", "final.norm.out", reduce="mean"),
        [
            *add("layers.1.mlp.in", "w", alpha=2.0),
            {"op": "read", "at": "layers.1.out"},
            {"op": "save", "name": "h", "x": 2},
        ],
    ]
    runs = [
        {"id": f"r{i}", "nodes": some, "ids": [5 + i, 6, 7], "gen": {"max_tokens": 4 + 5 * i % 8}}
        for i, some in enumerate(nodes)
    ]
    program = program_of(*runs, constants=constants)
    same(rig.run(program), rig.expect(program, constants))
    assert {run: visited[run] for run in visited} == {
        f"r{i}": [0, 3] for i in (0, 1, 3, 4, 5, 6, 7)
    }


def test_an_added_router_logit_chooses_experts_in_every_step(rig_of, program_of):
    rig, prompt = rig_of("mixtral"), [5, 6, 7]
    bias = {"v": torch.tensor([9.0, -9.0, 5.0, -5.0])}
    nodes = add("layers.0.moe.router")
    steps = {"nodes": nodes, "ids": prompt, "gen": {"max_tokens": 10}}
    tokens = rig.run(program_of(steps, constants=bias)).tokens[0]
    at_once = [
        *nodes, {"op": "read", "at": "logits"}, {"op": "argmax", "x": 2, "axes": [1]},
        {"op": "save", "name": "tokens", "x": 3},
    ]  # fmt: skip
    again = {"nodes": at_once, "ids": prompt + tokens[:-1]}
    assert rig.run(program_of(again, constants=bias)).saves["r0"]["tokens"][2:].tolist() == tokens
    plain = rig.run(program_of({**steps, "nodes": []})).tokens[0]
    assert plain != tokens


def test_saves_that_grow_too_large_end_their_program_alone(
    rig_of, program_of, outcome, monkeypatch
):
    rig = rig_of()
    monkeypatch.setattr(execution, "MAX_VALUE_BYTES", 20 * 48 * 4)
    saving = {"nodes": save("layers.0.out", reduce="mean"), "gen": {"max_tokens": 40}}
    beside = rig.send(program_of({"nodes": add("layers.0.out", "one"), "gen": {"max_tokens": 40}},
                                 constants={"one": torch.ones(1)}))  # fmt: skip
    found = rig.run(program_of(saving))
    assert found.error == "program_too_large"
    assert "saved bytes may be 4032, and at most 3840" in found.end.failure.message
    assert 10 <= len(found.tokens[0]) <= 14
    assert len(outcome(beside).tokens[0]) == 40
