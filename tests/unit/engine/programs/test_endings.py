"""What goes wrong ends one program with a typed error; the engine and its other rows go on."""

from __future__ import annotations

import base64

import pytest
import torch
from safetensors.torch import load

from fabric.messages import Program, Saves
from fabric.testing.families import FAMILIES

READ = [{"op": "read", "at": "logits"}, {"op": "save", "name": "logits", "x": 0}]


@pytest.fixture
def beside(rig_of, program_of):
    """Run a program next to a sound one, which must give what it always gives."""
    rig = rig_of()
    sound = program_of({"nodes": READ, "gen": {"max_tokens": 4}})
    expected = rig.run(sound).saves["r0"]["logits"]

    def run(program, **how):
        others = [rig.send(sound) for _ in range(2)]
        outcome = rig.run(program, **how)
        for other in others:
            events = other.wait().events
            assert events[-1].type == "finished"
            (saves,) = [e for e in events if isinstance(e, Saves)]
            found = load(base64.b64decode(saves.data))["logits"]
            assert torch.allclose(found, expected, atol=1e-4)
        return outcome

    return run


def write(x, at="layers.0.out", **sel):
    return [x, {"op": "write", "at": at, "x": 0, "mode": "set", **({"sel": sel} if sel else {})}]


def test_nan_that_is_written_ends_its_program(beside, program_of):
    nodes = write({"op": "const", "name": "x"})
    nan = torch.full((48,), float("nan"))
    outcome = beside(program_of({"nodes": nodes}, constants={"x": nan}))
    assert outcome.error == "program_failed"
    assert outcome.end.failure.detail == {
        "run": "r0", "node": 1, "reason": "what it writes at layers.0.out is not finite",
    }  # fmt: skip


def test_logits_that_overflow_end_their_program(beside, program_of):
    x = torch.full((48,), 3e38)
    nodes = write({"op": "const", "name": "x"}, at="final.norm.out")
    outcome = beside(program_of({"nodes": nodes, "gen": {"max_tokens": 3}}, constants={"x": x}))
    assert outcome.error == "program_failed"


def test_a_skip_of_another_shape_is_refused_before_anything_runs(beside, program_of):
    nodes = [
        {"op": "zeros", "shape": [3, 48]},
        {"op": "skip", "module": "layers.0.mlp", "x": 0},
    ]
    outcome = beside(program_of({"nodes": nodes}))
    assert outcome.error == "program_invalid"
    assert outcome.end.failure.detail["node"] == 1
    assert outcome.end.usage.device_s == 0.0


def test_a_save_of_4_gb_is_refused_before_it_is_made(beside, program_of):
    nodes = [{"op": "zeros", "shape": [2**30]}, {"op": "save", "name": "x", "x": 0}]
    assert beside(program_of({"nodes": nodes})).error == "program_too_large"


def test_results_over_the_programs_own_limit_are_refused(beside, program_of):
    nodes = [{"op": "read", "at": "logits"}, {"op": "save", "name": "logits", "x": 0}]
    assert beside(program_of({"nodes": nodes}, result_bytes=5000)).error == "program_too_large"


@pytest.mark.parametrize("position", [7, 10_000, -8])
def test_a_position_that_no_step_runs_is_refused(position, beside, program_of):
    read = {"op": "read", "at": "layers.0.out", "sel": {"pos": [position]}}
    nodes = [read, {"op": "save", "name": "h", "x": 0}]
    assert beside(program_of({"nodes": nodes})).error == "program_invalid"


def test_a_span_that_is_not_in_the_prompt_is_refused(beside, program_of):
    read = {"op": "read", "at": "layers.0.out", "sel": {"pos": {"span": "dog"}}}
    nodes = [read, {"op": "save", "name": "h", "x": 0}]
    outcome = beside(program_of({"nodes": nodes, "ids": None, "text": "the cat"}))
    assert outcome.error == "program_invalid"
    assert "dog" in outcome.end.failure.message


def test_a_point_that_is_refused_says_why(rig_of, program_of):
    rig = rig_of("mixtral")
    for at, access in (("layers.0.mlp.act", "read"), ("layers.0.moe.experts", "write")):
        node = {"op": "read", "at": at} if access == "read" else {
            "op": "write", "at": at, "mode": "scale", "alpha": 2.0,
        }  # fmt: skip
        outcome = rig.run(program_of({"nodes": [node]}))
        assert outcome.error == "point_refused"
        assert "experts" in outcome.end.failure.message


def test_an_unknown_point_is_refused(beside, program_of):
    outcome = beside(program_of({"nodes": [{"op": "read", "at": "layers.9.out"}]}))
    assert outcome.error == "point_unknown"


def test_constants_of_another_digest_are_refused(beside, program_of):
    program = program_of({"nodes": READ}, constants={"x": torch.zeros(3)})
    consts = program.consts.model_copy(update={"sha256": "0" * 64})
    assert beside(program.model_copy(update={"consts": consts})).error == "program_invalid"


def test_constants_that_are_elsewhere_are_refused(beside, program_of):
    program = program_of({"nodes": READ}, constants={"x": torch.zeros(3)})
    consts = program.consts.model_copy(update={"data": None, "handle": {"artifact": "art_0"}})
    assert beside(program.model_copy(update={"consts": consts})).error == "program_invalid"


def test_an_overlay_of_another_shape_is_refused(beside, program_of):
    overlay = {"kind": "lowrank", "weight": "model.layers.0.self_attn.o_proj.weight",
               "u": "u", "v": "u"}  # fmt: skip
    program = program_of(
        {"nodes": READ, "overlays": [overlay]}, constants={"u": torch.zeros(40, 2)}
    )
    assert beside(program).error == "program_invalid"


def test_a_run_longer_than_the_context_is_refused(beside, program_of):
    program = program_of({"nodes": READ, "gen": {"max_tokens": 300}})
    assert beside(program).error == "program_invalid"


@pytest.mark.parametrize("lane", ["shared", "gradient"])
def test_a_program_ends_when_its_device_time_is_over(lane, beside, program_of):
    nodes = list(READ)
    if lane == "gradient":
        nodes += [{"op": "slice", "x": 0, "index": [-1, 3]},
                  {"op": "grad", "scalar": 2, "wrt": "layers.0.out"}]  # fmt: skip
    program = program_of({"nodes": nodes}, device_s=1e-5)
    outcome = beside(program)
    assert outcome.error == "program_too_large"
    assert outcome.end.failure.detail["cap"] == "limits.device_s"


def test_a_value_too_large_to_be_made_fails_alone(beside, program_of):
    nodes = [
        {"op": "read", "at": "layers.0.out"},
        {"op": "reshape", "x": 0, "shape": [336, 1]},
        {"op": "reshape", "x": 0, "shape": [336]},
        {"op": "mul", "x": 1, "y": 2},
        {"op": "reshape", "x": 3, "shape": [112896, 1]},
        {"op": "reshape", "x": 3, "shape": [112896]},
        {"op": "mul", "x": 4, "y": 5},
        {"op": "sum", "x": 6},
        {"op": "save", "name": "x", "x": 7},
    ]
    assert beside(program_of({"nodes": nodes})).error in ("program_too_large", "program_failed")


def test_a_cancelled_program_frees_its_rows(rig_of, program_of, wait_until):
    rig = rig_of()
    runs = [{"id": f"r{i}", "nodes": READ[:1], "gen": {"max_tokens": 200}} for i in range(3)]
    heard = rig.send(program_of(*runs))
    wait_until(lambda: len(heard.events) > 10, 60.0)
    rig.engine.cancel(rig.last_task.id, 1)
    assert heard.failed.failure.code == "request_cancelled"
    assert heard.failed.usage.output_tokens > 0
    wait_until(lambda: rig.engine.load().num_running == 0, 60.0)


def test_two_programs_of_one_id_do_not_meet(rig_of, program_of, heard):
    rig = rig_of()
    program = program_of({"nodes": READ, "gen": {"max_tokens": 60}})
    first, second = rig.send(program), heard()
    rig.engine.submit(rig.last_task, second)
    assert second.failed.failure.code == "invalid_parameter"
    assert first.wait().events[-1].type == "finished"


def test_large_results_go_to_the_keeper_or_are_refused(rig_of, program_of):
    kept = []

    def keep(data: bytes) -> dict[str, object]:
        kept.append(data)
        return {"artifact": f"art_{len(kept)}"}

    nodes = [{"op": "zeros", "shape": [1200, 1000]}, {"op": "save", "name": "x", "x": 0}]
    program = program_of({"nodes": nodes})
    (saves,) = [e for e in rig_of(keep=keep, fresh=1).run(program).events if isinstance(e, Saves)]
    assert saves.handle == {"artifact": "art_1"}
    assert saves.data is None
    assert saves.size == len(kept[0])
    assert load(kept[0])["x"].shape == (1200, 1000)
    assert rig_of().run(program).error == "program_too_large"


def test_usage_counts_what_went_in_and_out(rig_of, program_of):
    rig = rig_of()
    program = program_of(
        {"nodes": READ, "gen": {"max_tokens": 3}}, {"nodes": READ}, constants={"x": torch.zeros(9)}
    )
    outcome = rig.run(program)
    usage = outcome.end.usage
    sizes = [e.size for e in outcome.events if isinstance(e, Saves)]
    assert usage.hook_bytes_out == sum(sizes)
    assert usage.hook_bytes_in == program.consts.size
    assert (usage.prompt_tokens, usage.output_tokens) == (14, 3)
    assert usage.device_s > 0.0


def test_seconds_of_programs_sum_to_the_engines(rig_of, program_of, wait_until):
    rig = rig_of(fresh="seconds")
    nodes = [*READ, {"op": "slice", "x": 0, "index": [-1, 3]},
             {"op": "grad", "scalar": 2, "wrt": "layers.0.out"}]  # fmt: skip
    program = program_of({"nodes": READ, "gen": {"max_tokens": 9}}, {"nodes": nodes}, {})
    heard = [rig.send(program) for _ in range(3)]
    total = sum(h.wait().events[-1].usage.device_s for h in heard)
    wait_until(lambda: rig.engine.load().busy_s == pytest.approx(total, rel=1e-6), 60.0)


def test_engines_say_that_they_run_programs(rig_of):
    info = rig_of().engine.info
    assert "program" in info.limits.modes
    assert info.points.digest == info.digest
    assert info.points.num_layers == 2
    assert info.points.weights["lm_head.weight"] == (259, 48)
    assert info.points.num_parameters == sum(p.numel() for p in FAMILIES["llama"]().parameters())


def test_an_empty_run_of_a_program_is_a_plain_pass(rig_of):
    program = Program.model_validate({"runs": [{"id": "a", "ids": [1, 2]}]})
    outcome = rig_of().run(program)
    assert outcome.end.finish_reasons == ("length",)
    assert not outcome.saves
