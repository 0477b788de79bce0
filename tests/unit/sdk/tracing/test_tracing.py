"""What is written with traced values is what numpy would compute; what cannot be is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fabric import session, trace
from fabric.errors import FabricError, ProgramFailed, TraceError
from fabric.messages import PointManifest
from fabric.sdk.programs import RunToken, StepSaves
from fabric.sdk.tracing import InProcess

PROMPT = "A lens on it"
HIDDEN = 48
V = np.linspace(-1.0, 1.0, HIDDEN, dtype=np.float32)
W = np.cos(np.arange(HIDDEN * 5, dtype=np.float32)).reshape(HIDDEN, 5)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


COMPUTED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "numbers": (lambda h: 2.0 * h - h / 3 + 1, lambda h: 2.0 * h - h / 3 + 1),
    "numbers on the left": (lambda h: (1 - h) + 1 / (h * h + 1), lambda h: 1 - h + 1 / (h**2 + 1)),
    "powers": (lambda h: h**3 + (h**2) ** 0.5, lambda h: h**3 + np.abs(h)),
    "an array on either side": (lambda h: V * h + h - V, lambda h: V * h + h - V),
    "a tensor of torch": (lambda h: torch.tensor(V) * h, lambda h: V * h),
    "a matrix": (lambda h: h @ W, lambda h: h @ W),
    "a vector": (lambda h: h @ V, lambda h: h @ V),
    "a matrix on the left": (lambda h: W.T @ h[3], lambda h: W.T @ h[3]),
    "numpy's functions": 2 * (lambda h: np.tanh(h) + np.exp(-abs(h)),),
    "a list of entries": (lambda h: h.clone()[:, [3, 1]], lambda h: h[:, [3, 1]]),
    "entries from the end": (lambda h: h.clone()[..., -2], lambda h: h[..., -2]),
    "a range": (lambda h: h.clone()[1:4, 2:], lambda h: h[1:4, 2:]),
    "a comparison as numbers": (lambda h: h * (h > 0.1), lambda h: h * (h > 0.1)),
    "a choice": (lambda h: h.where(h > 0.1, -1.0), lambda h: np.where(h > 0.1, h, -1.0)),
    "axes": 2 * (lambda h: h.mean(0) + h.max(0) - h.min(0) + h.sum(0),),
    "lengths": (lambda h: h.norm(), lambda h: np.linalg.norm(h, axis=-1)),
    "variance": (lambda h: h.var(-1, keepdims=True), lambda h: h.var(-1, keepdims=True)),
    "softmax": (lambda h: h.softmax(), softmax),
    "log_softmax": (lambda h: h.log_softmax().exp(), softmax),
    "the largest": (lambda h: h.argmax(), lambda h: h.argmax(-1)),
    "relu": (lambda h: h.relu() + h.jumprelu(0.2), lambda h: np.maximum(h, 0) + h * (h > 0.2)),
    "sigmoid and silu": (lambda h: h.sigmoid() * h - h.silu(), lambda h: 0 * h),
    "shapes": (lambda h: h.clone().permute(1, 0).reshape(-1, 6), lambda h: h.T.reshape(-1, 6)),
    "a new axis": (lambda h: h.unsqueeze(1), lambda h: h[:, None]),
    "cosine": (
        lambda h: h.cosine(V),
        lambda h: h @ V / np.linalg.norm(h, axis=-1) / np.linalg.norm(V),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_values_compute_as_numpy_does(backend: object, name: str) -> None:
    ours, theirs = COMPUTED[name]
    with trace(backend, PROMPT) as t:
        h = t.layers[1].out.save()
        made = ours(t.layers[1].out).save()
    np.testing.assert_allclose(made.value, theirs(h.value), rtol=2e-4, atol=2e-4)


INDEXED: dict[str, Callable[[Any], Any]] = {
    "one position": lambda h: h[3],
    "the last": lambda h: h[-1],
    "a range of positions": lambda h: h[2:5],
    "from a position on": lambda h: h[7:],
    "up to the last three": lambda h: h[:-3],
    "the last three": lambda h: h[-3:],
    "every other": lambda h: h[0:8:2],
    "listed": lambda h: h[[4, 1]],
    "a dimension": lambda h: h[:, 5],
    "listed dimensions": lambda h: h[2, [5, 3]],
    "a range of dimensions": lambda h: h[-1, 3:6],
    "the last dimension": lambda h: h[..., -1],
}


@pytest.mark.parametrize("name", INDEXED)
def test_places_are_indexed_as_arrays_are(backend: object, name: str) -> None:
    with trace(backend, PROMPT) as t:
        whole = t.layers[1].out.save()
        part = INDEXED[name](t.layers[1].out).save()
    np.testing.assert_allclose(part.value, INDEXED[name](whole.value), rtol=1e-6)


def test_heads_are_the_second_axis(backend: object) -> None:
    with trace(backend, PROMPT) as t:
        z = t.layers[1].attn.z
        whole, one, some = z.save(), z[:, 2].save(), z[-1, [3, 0], 1:4].save()
    np.testing.assert_allclose(one.value, whole.value[:, 2])
    np.testing.assert_allclose(some.value, whole.value[-1, [3, 0], 1:4])


def _by_add(t: Any) -> None:
    t.layers[1].out += V


def _by_parts(t: Any) -> None:
    t.layers[1].out[2] = V
    t.layers[1].out[3:5] *= 2.0
    t.layers[1].out[-1, 7] -= 1.0


def _by_methods(t: Any) -> None:
    t.layers[1].out.scale(3.0).project(V).clamp(V, -0.1, 0.1)
    t.layers[1].out[0].add(V, norm="match")


def _by_gate(t: Any) -> None:
    seen = t.layers[1].out
    seen.add(V, gate=seen[:, 0] > 0.0)


def _expected_parts(h: np.ndarray) -> np.ndarray:
    h[2] = V
    h[3:5] *= 2
    h[-1, 7] -= 1
    return h


def _expected_methods(h: np.ndarray) -> np.ndarray:
    unit = V / np.linalg.norm(V)
    h = 3 * h
    h = h - np.outer(h @ unit, unit)
    h[0] += unit * np.linalg.norm(h[0])
    return h


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_by_add, lambda h: h + V),
        (_by_parts, _expected_parts),
        (_by_methods, _expected_methods),
        (_by_gate, lambda h: h + (h[:, :1] > 0) * V),
    ],
)
def test_changes_are_seen_by_what_comes_after(
    backend: object, change: Callable[[Any], None], expected: Callable[[Any], Any]
) -> None:
    with trace(backend, PROMPT) as t:
        before = t.layers[1].out.clone().save("before")
        change(t)
        after = t.layers[1].out.save("after")
        logits = t.logits[-1].save()
    with trace(backend, PROMPT) as t:
        plain = t.logits[-1].save()
    np.testing.assert_allclose(after.value, expected(before.value.copy()), rtol=1e-4, atol=1e-4)
    assert np.abs(plain.value - logits.value).max() > 1e-3


def test_a_head_is_taken_over_at_some_positions(backend: object) -> None:
    with session(backend) as s:
        a, b = s.run("some text"), s.run("any other")
        b.layers[1].attn.head_out[2:4, 1] = a.layers[1].attn.head_out[2:4, 1]
        given = a.layers[1].attn.head_out[2:4, 1].save()
        taken = b.layers[1].attn.head_out.save()
    np.testing.assert_allclose(taken.value[2:4, 1], given.value, atol=1e-5)
    assert np.abs(taken.value[2:4, 2] - given.value).max() > 1e-3


def test_lines_may_stand_in_any_order(backend: object) -> None:
    with trace(backend, PROMPT) as t:
        late = t.logits[-1].save()
        early = t.embed.out.save()
        t.layers[0].out += 2.0 * t.embed.out
    with trace(backend, PROMPT) as t:
        t.layers[0].out += 2.0 * early.value
        expected = t.logits[-1].save()
    np.testing.assert_allclose(late.value, expected.value, rtol=1e-4, atol=1e-4)


def test_a_span_is_found_where_the_tokenizer_is(backend: object) -> None:
    with trace(backend, PROMPT) as t:
        whole, part = t.embed.out.save(), t.embed.out[t.pos("lens")].save()
    np.testing.assert_allclose(part.value, whole.value[2:6])


def test_blocks_of_steps_choose_what_is_read_and_changed(backend: object) -> None:
    with trace(backend, PROMPT, max_tokens=4) as t:
        everything = t.layers[1].out.save("all")
        with t.decode():
            generated = t.layers[1].out.save("generated")
            last = t.layers[1].out[-1].save("last")
        with t.step(2):
            one = t.layers[1].out.save("one")
    num = len(PROMPT)
    assert everything.shape == (num + 3, HIDDEN)
    np.testing.assert_allclose(generated.value, everything.value[num:], atol=1e-5)
    np.testing.assert_allclose(last.value.reshape(3, -1), everything.value[num:], atol=1e-5)
    np.testing.assert_allclose(one.value.ravel(), everything.value[num + 1], atol=1e-5)
    assert generated.positions == (num, num + 1, num + 2)


def test_a_forced_token_is_generated(backend: object) -> None:
    with trace(backend, PROMPT, max_tokens=3) as t, t.step(1):
        t.sample[-1] = 65
    assert t.tokens[1] == 65


def test_parts_of_the_stack_run_alone(backend: object) -> None:
    with session(backend) as s:
        whole = s.run(PROMPT)
        first = s.run(PROMPT)
        first.stop_at(2)
        second = s.run(PROMPT)
        second.start_at(2, first.layers[1].out)
        logits = whole.logits[-1].save(), second.logits[-1].save()
    np.testing.assert_allclose(logits[0].value, logits[1].value, rtol=1e-4, atol=1e-4)


def test_a_skipped_module_says_what_it_is_given(backend: object) -> None:
    with trace(backend, PROMPT) as t:
        t.layers[1].mlp.skip(t.zeros(1, HIDDEN))
        mid, out = t.layers[1].mid.save(), t.layers[1].out.save()
    np.testing.assert_allclose(mid.value, out.value, atol=1e-6)


def test_overlays_change_a_weight_for_one_run(backend: object, bare: Any) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    u, v = np.ones((HIDDEN, 1)), np.ones((64, 1))
    with session(backend) as s:
        plain, scaled, changed = s.run(PROMPT), s.run(PROMPT), s.run(PROMPT)
        scaled.overlay(name, scale=2.0)
        changed.overlay(name, lowrank=(u, v), alpha=0.5)
        outs = [run.layers[0].mlp.out.save() for run in (plain, scaled, changed)]
        act = plain.layers[0].mlp.act.save()
        read = changed.weight(name)[:2, :3].save()
    np.testing.assert_allclose(outs[1].value, 2 * outs[0].value, rtol=1e-4, atol=1e-5)
    expected = outs[0].value + 0.5 * act.value.sum(-1, keepdims=True)
    np.testing.assert_allclose(outs[2].value, expected, rtol=1e-3, atol=1e-4)
    weight = bare.get_parameter(name).detach().numpy()
    np.testing.assert_allclose(read.value, weight[:2, :3] + 0.5, rtol=1e-4)


def test_sweeps_give_one_array_with_named_axes(backend: object) -> None:
    with session(backend) as s:
        base = s.run(PROMPT)
        plain = base.logits[-1].save()
        grid = s.sweep(PROMPT, layer=[0, 2], scale=[0.0, 1.0, 2.0])
        for run, layer, scale in grid:
            run.layers[layer].out.scale(scale)
            run.logits[-1].save("logits")
    found = grid["logits"]
    assert found.shape == (2, 3, 259)
    assert found.axes == {"layer": (0, 2), "scale": (0.0, 1.0, 2.0)}
    np.testing.assert_allclose(found.at(layer=2, scale=1.0), plain.value, atol=1e-4)
    assert found.at(layer=0).axes == {"scale": (0.0, 1.0, 2.0)}


def test_what_one_trace_gave_goes_into_the_next(backend: object) -> None:
    with trace(backend, PROMPT) as t:
        h = t.layers[1].out[-1].save()
    with trace(backend, "x") as t:
        t.layers[1].out[-1] = h
        taken = t.layers[1].out[-1].save()
    np.testing.assert_allclose(taken.value, h.value, atol=1e-6)
    with pytest.raises(TraceError, match="is over"):
        _ = h + 1


def test_streamed_saves_arrive_by_steps(engine: Any) -> None:
    events: list[Any] = []
    with trace(engine, PROMPT, max_tokens=3, on_event=events.append) as t:
        h = t.layers[1].out.save(stream=True)
    steps = [event for event in events if isinstance(event, StepSaves)]
    assert [event.step for event in steps] == [0, 1, 2]
    assert sum(isinstance(event, RunToken) for event in events) == 3
    assert h.shape == (len(PROMPT) + 2, HIDDEN)
    assert h.positions == tuple(range(len(PROMPT) + 2))


def _truth(t: Any) -> None:
    if t.layers[0].out > 3:
        pass


def _loop(t: Any) -> None:
    list(t.layers[0].out)


def _later(t: Any) -> None:
    t.layers[0].out = t.layers[2].out


def _shape(t: Any) -> None:
    t.layers[0].out += np.ones(47)


def _rest(t: Any) -> None:
    t.layers[0].out[1:] = 0.0


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a truth": (_truth, "no truth"),
    "a loop": (_loop, "looped over"),
    "a length": (lambda t: len(t.logits), "no length"),
    "a number": (lambda t: float(t.logits[-1, 3]), "not computed yet"),
    "an array": (lambda t: np.asarray(t.logits), "not computed yet"),
    "numpy's sine": (lambda t: np.sin(t.logits), "sin cannot be computed"),
    "a later value": (_later, "comes by later"),
    "a wrong shape": (_shape, "47"),
    "an open range": (_rest, "ranges with two ends"),
    "no such point": (lambda t: t.layers[0].atn.out, "Did you mean 'attn'"),
    "no such layer": (lambda t: t.layers[3], "the model has 3"),
    "a point of other families": (lambda t: t.layers[0].moe.experts, "no point"),
    "a position past the end": (lambda t: t.logits[99].save(), "99"),
    "a text as an index": (lambda t: t.logits["lens"], "not indexed by str"),
    "too many axes": (lambda t: t.logits[0, 1, 2], "2 axes"),
    "too large a number": (lambda t: t.logits[2**40].save(), "less than"),
    "too large a k": (lambda t: t.logits.topk(10**9), "1024"),
    "texts in an array": (lambda t: t.logits * ["a"], "real numbers"),
    "complex numbers": (lambda t: t.logits * np.array([1j]), "real numbers"),
    "ragged lists": (lambda t: t.logits * [[1], [1, 2]], "real numbers"),
    "a name twice": (lambda t: (t.logits.save("x"), t.logits[0].save("x")), "is taken"),
    "a value too early": (lambda t: t.logits.save().value, "no value yet"),
    "another trace's value": (
        lambda t: t.logits + trace(t._session._given, "y").logits,
        "a trace that is not over",
    ),
    "a skip of the wrong shape": (lambda t: t.layers[0].mlp.skip(np.ones((5, 3))), "3"),
    "no such weight": (lambda t: t.overlay("model.nothing", scale=1.0), "model.nothing"),
    "two overlays in one": (
        lambda t: t.overlay("model.norm.weight", scale=1.0, normalize=1),
        "one of lowrank",
    ),
    "a gradient of a value": (lambda t: t.grad(t.logits[0, 0], wrt=t.logits * 1), "with respect"),
    "a gradient of a vector": (
        lambda t: t.grad(t.logits[0], wrt=t.layers[0].out).save(),
        "scalar|number|\\(\\)|\\[\\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compile_names_the_line(oracle: Any, name: str) -> None:
    line, reason = REFUSED[name]
    before = len(oracle.programs)
    with pytest.raises(TraceError, match=reason) as caught:
        _run(oracle, line)
    assert caught.value.detail["file"] == __file__
    text = Path(__file__).read_text().splitlines()[int(str(caught.value.detail["line"])) - 1]
    assert caught.value.detail["source"] == text.strip()
    assert len(oracle.programs) == before


def _run(oracle: Any, line: Callable[[Any], object]) -> None:
    with trace(oracle, PROMPT) as t:
        line(t)
        t.final.norm.out.save()


@pytest.mark.parametrize(
    ("prompt", "options"),
    [("", {}), ([], {}), ("x", {"max_tokens": -1}), ("x", {"temperature": 9.0})],
)
def test_runs_that_cannot_be_are_refused(oracle: Any, prompt: Any, options: Any) -> None:
    with pytest.raises(TraceError):
        trace(oracle, prompt, **options)


def test_runs_of_one_name_and_empty_sweeps_are_refused(oracle: Any) -> None:
    with session(oracle, dry_run=True) as s:
        s.run("x", id="a")
        with pytest.raises(TraceError, match="already"):
            s.run("x", id="a")
        with pytest.raises(TraceError, match="no entries"):
            s.sweep("x", layer=[])
        with pytest.raises(TraceError, match="1024 runs"):
            s.sweep("x", layer=range(40), position=range(40))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_end_one_trace_and_not_the_engine(engine: Any, value: float) -> None:
    t = trace(engine, PROMPT)
    t.layers[0].out[0] = np.full(HIDDEN, value)
    with pytest.raises(ProgramFailed) as caught, t:
        t.logits[-1].save()
    assert any("np.full(HIDDEN, value)" in note for note in caught.value.__notes__)
    with trace(engine, PROMPT) as t:
        fine = t.logits[-1].save()
    assert np.isfinite(fine.value).all()


def test_results_too_large_to_be_sent_are_read_from_where_they_are(engine: Any) -> None:
    with trace(engine, PROMPT) as t:
        h = t.layers[1].out.save("h")
        large = (t.zeros(400_000, 4) + h[0, :4]).save("large")
    assert large.value.nbytes > 4 * 2**20
    np.testing.assert_allclose(large.value[-1], h.value[0, :4])


def test_traces_of_several_threads_keep_apart(engine: Any) -> None:
    found: dict[int, np.ndarray] = {}

    def one(number: int) -> None:
        with trace(engine, PROMPT) as t:
            t.layers[1].out[-1] = np.full(HIDDEN, float(number))
            h = t.layers[1].out[-1].save()
        found[number] = h.value

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: set(h.tolist()) for n, h in found.items()} == {n: {float(n)} for n in range(4)}


def test_in_process_a_quote_costs_nothing_and_bounds_the_result(engine: Any) -> None:
    with trace(engine, PROMPT) as t:
        t.layers[1].out += V
        t.logits.save()
        quote = t.quote()
    assert quote.charge_usu_max == 0
    assert quote.result_bytes >= t.usage.hook_bytes_out
    assert set(quote.scopes) == {"program:read", "program:write"}
    assert t.site is None
    assert InProcess(engine).points().digest == t.digest


def test_every_point_of_the_manifest_can_be_named(engine: Any, manifest: PointManifest) -> None:
    with trace(engine, PROMPT) as t:
        saved = {
            spec.pattern: t.place(spec.pattern.replace("{i}", "1")).save()
            for spec in manifest.points
            if spec.read and spec.pattern != "sample"
        }
    assert all(array.value.size for array in saved.values())
    assert len(saved) > 15
    with pytest.raises(FabricError):
        t.place("layers[1].nowhere")
