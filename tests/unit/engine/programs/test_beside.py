"""Gradient passes go in slices: other rows decode meanwhile, and see nothing of them."""

from __future__ import annotations

import pytest
import torch

from fabric.engine.programs.aside import Aside
from fabric.messages import Request, Sampling, Task, TokensInput

SLICED = {"slowdown": 1.0, "step_tokens": 400}
"""No row waits longer than it must: a pass pauses wherever it can."""

LONG = [(7 * i) % 250 for i in range(120)]
LOGIT = [
    {"op": "read", "at": "logits", "sel": {"pos": "last"}},
    {"op": "slice", "x": 0, "index": [0, 7]},
]


def gradient(*, points=("layers.0.out", "layers.1.attn.z"), name="g", **run):
    nodes = list(LOGIT)
    for point in points:
        nodes.append({"op": "grad", "scalar": 1, "wrt": point})
        nodes.append({"op": "save", "name": point, "x": len(nodes) - 1})
    return {"id": name, "ids": LONG, "nodes": nodes, **run}


def row_of(rig, heard, log, *, num=240):
    """A request that decodes; it notes each of its tokens in ``log``."""
    how = Sampling(temperature=0.0, max_tokens=num, ignore_eos=True)
    request = Request(model="tiny", input=TokensInput(ids=(1, 2, 3)), sampling=how)
    task = Task(id=request.id, attempt=1, request=request, digest=rig.engine.info.digest,
                deadline_s=120.0)  # fmt: skip
    sink = heard(lambda event: log.append(event.type))
    rig.engine.submit(task, sink)
    return sink, task


def test_other_rows_decode_during_one_gradient_pass(rig_of, program_of, heard, wait_until):
    rig = rig_of(fresh="beside", **SLICED)
    rig.run(program_of(gradient()))  # the plain copy is loaded
    alone = rig.run(program_of({"id": "r", "ids": [1, 2, 3], "gen": {"max_tokens": 240}}))
    log: list[str] = []
    row, _ = row_of(rig, heard, log)
    wait_until(lambda: len(log) > 1, 60.0)
    assert log[1] == "token"
    program = program_of(gradient())
    outcome_events = rig.send(program, on_event=lambda event: log.append(f"program {event.type}"))
    outcome_events.wait()
    row.wait()
    between = log[log.index("program accepted") : log.index("program saves")]
    assert between.count("token") >= 3, "the row stood still while gradients were computed"
    assert row.ids() == alone.tokens[0]


def test_gradients_in_slices_are_the_oracles(rig_of, program_of, heard, outcome, wait_until):
    rig = rig_of(fresh="beside", **SLICED)
    log: list[str] = []
    row, task = row_of(rig, heard, log)
    wait_until(lambda: len(log) > 1, 60.0)
    assert log[1] == "token"
    program = program_of(gradient(), gradient(name="h", points=("embed.out", "layers.1.mid")))
    found, expected = rig.run(program), rig.expect(program)
    rig.engine.cancel(task.id, 1)
    row.wait()
    for run in ("g", "h"):
        for name, value in expected[run].saves.items():
            assert torch.allclose(found.saves[run][name], value, atol=1e-5), (run, name)
            assert float(value.abs().max()) > 1e-5


def test_a_gradient_program_is_cancelled_in_the_middle_of_its_pass(
    rig_of, program_of, heard, wait_until
):
    rig = rig_of(fresh="beside", **SLICED)
    log: list[str] = []
    row, task = row_of(rig, heard, log)
    wait_until(lambda: len(log) > 1, 60.0)
    assert log[1] == "token"
    many = program_of(*[gradient(name=f"g{i}") for i in range(64)])
    sink = rig.send(many)
    wait_until(lambda: any(event.type == "saves" for event in sink.events), 60.0)
    rig.engine.cancel(rig.last_task.id, 1)
    assert sink.failed.failure.code == "request_cancelled"
    assert sink.failed.usage.device_s > 0.0
    rig.engine.cancel(task.id, 1)
    row.wait()
    again = program_of(gradient())
    found, expected = rig.run(again).saves["g"], rig.expect(again)["g"].saves
    assert torch.allclose(found["layers.0.out"], expected["layers.0.out"], atol=1e-5)


def test_a_runs_own_weights_are_not_seen_beside_its_gradients(rig_of, program_of, heard, outcome):
    """Packed layers are computed for overlays from the plain copy, which gradients run over."""
    torch.manual_seed(3)
    from fabric.testing.families import FAMILIES

    rig = rig_of(model=FAMILIES["llama"]().bfloat16().eval(), dtype="bfloat16",
                 **SLICED)  # fmt: skip
    weight = "model.layers.0.mlp.down_proj.weight"
    huge = [{"kind": "scale", "weight": weight, "k": 50.0}]
    small = [{"kind": "scale", "weight": weight, "k": 1.01}]
    logits = [{"op": "read", "at": "logits", "sel": {"pos": "last"}},
              {"op": "save", "name": "logits", "x": 0}]  # fmt: skip
    probe = program_of({"id": "p", "nodes": logits, "overlays": small, "gen": {"max_tokens": 4}})
    alone = rig.run(probe).saves["p"]["logits"]
    changed = program_of({"id": "p", "nodes": logits, "overlays": huge, "gen": {"max_tokens": 4}})
    assert not torch.allclose(rig.run(changed).saves["p"]["logits"], alone, atol=0.5)
    sink = rig.send(program_of(*[gradient(name=f"g{i}", overlays=huge) for i in range(12)]))
    probes = 0
    while not any(event.type in ("finished", "failed") for event in sink.events):
        assert torch.equal(rig.run(probe).saves["p"]["logits"], alone)
        probes += 1
    assert sink.wait().events[-1].type == "finished"
    assert probes > 1


def test_closing_an_engine_ends_a_gradient_pass(program_of, rig_of, wait_until):
    rig = rig_of(fresh="closing", **SLICED)
    sink = rig.send(program_of(*[gradient(name=f"g{i}") for i in range(64)]))
    wait_until(lambda: any(event.type == "saves" for event in sink.events), 60.0)
    rig.engine.close()
    assert sink.failed.failure.code == "engine_stopped"


def test_work_goes_on_only_in_its_slices():
    seen: list[int] = []

    def work(aside: Aside) -> None:
        aside.pause()
        for i in range(3):
            seen.append(i)
            aside.pause()

    aside = Aside(work)
    while not seen:
        assert not aside.go_on(1.0)
    assert seen == [0]
    assert [aside.go_on(1.0) for _ in range(3)] == [False, False, True]
    assert seen == [0, 1, 2]


def test_what_work_raises_is_raised_where_it_is_awaited():
    def work(aside: Aside) -> None:
        aside.pause()
        raise ValueError("it cannot be done")

    aside = Aside(work)

    def finish() -> None:
        while not aside.go_on(1.0):
            pass

    with pytest.raises(ValueError, match="it cannot be done"):
        finish()
    aside.abandon()


def test_abandoned_work_ends_where_it_pauses():
    seen: list[str] = []

    def work(aside: Aside) -> None:
        try:
            aside.pause()
            seen.append("went on")
        except Exception:
            seen.append("took it for an error")
        finally:
            seen.append("cleaned up")

    aside = Aside(work)
    aside.go_on(0.0)
    aside.abandon()
    assert seen == ["cleaned up"]
