"""Recipes reproduce their published definitions, computed by hand with transformers and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fabric import recipes, trace
from fabric.errors import RequestInvalid
from fabric.sdk.recipes import Condition, SparseAutoencoder, patching

PROMPT = "A lens on it"
CLEAN, CORRUPT = "red cats", "big dogs"
ANSWER, INSTEAD = 5, 77
LAYERS = range(3)
HIDDEN, HEADS = 48, 4

ByHand = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
rng = np.random.default_rng(5)


def vector(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def close(found: object, expected: object, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance
    )


def at(position: int | None, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change one position (or all) of a module's output [1, T, hidden]."""

    def made(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        where = slice(None) if position is None else position
        output[0, where] = change(output[0, where])
        return output

    return made


def adding(x: object, position: int | None = None) -> Any:
    return at(position, lambda h: h + torch.as_tensor(x))


def setting(x: object, position: int | None = None) -> Any:
    return at(position, lambda h: torch.as_tensor(x).expand_as(h))


def layer(number: int) -> str:
    return f"model.layers.{number}"


def test_logit_lens(backend: object, bare: Any, by_hand: ByHand) -> None:
    lens = recipes.logit_lens(backend, PROMPT, k=3)
    logits, states = by_hand(PROMPT, keep=[layer(n) for n in LAYERS])
    for number in LAYERS:
        with torch.no_grad():
            said = bare.lm_head(bare.model.norm(states[layer(number)])).softmax(-1)
        close(lens.probabilities[number], said.topk(3).values)
        assert (lens.ids[number] == said.topk(3).indices.numpy()).all()
    close(lens.probabilities[-1, :, 0], logits.softmax(-1).max(-1).values)
    assert lens.columns == tuple(PROMPT)
    assert lens.rows == ("layer 0", "layer 1", "layer 2")


def test_tuned_lens(backend: object, bare: Any, by_hand: ByHand) -> None:
    weight, bias = vector(HIDDEN, HIDDEN, scale=0.1), vector(HIDDEN)
    lens = recipes.tuned_lens(backend, PROMPT, {1: (weight, bias)})
    h = by_hand(PROMPT, keep=[layer(1)])[1][layer(1)]
    with torch.no_grad():
        said = bare.lm_head(bare.model.norm(h + h @ torch.tensor(weight).T + torch.tensor(bias)))
    close(lens.probabilities[0, :, 0], said.softmax(-1).max(-1).values)


def heads_by_hand(bare: Any, by_hand: ByHand, number: int) -> torch.Tensor:
    """What each head adds at each position, [T, heads, hidden]."""
    projection = bare.get_submodule(f"{layer(number)}.self_attn.o_proj")
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    by_hand(PROMPT)
    handle.remove()
    z = seen[0].unflatten(-1, (HEADS, -1))
    weight = projection.weight.detach().unflatten(1, (HEADS, -1))
    return torch.einsum("thd,mhd->thm", z, weight)


def test_attention_lens_of_the_models_own_unembedding(
    backend: object, bare: Any, by_hand: ByHand
) -> None:
    lens = recipes.attention_lens(backend, PROMPT, layers=[2])
    with torch.no_grad():
        heads = heads_by_hand(bare, by_hand, 2)[-1]
        said = bare.lm_head(bare.model.norm(heads)).softmax(-1)
    close(lens.probabilities[0, :, 0], said.max(-1).values)
    assert (lens.ids[0, :, 0] == said.argmax(-1).numpy()).all()


def test_attention_lens_with_trained_lenses(backend: object, bare: Any, by_hand: ByHand) -> None:
    trained = {1: vector(HEADS, 259, HIDDEN, scale=0.3)}
    lens = recipes.attention_lens(backend, PROMPT, lenses=trained)
    total = recipes.lens_logits(backend, PROMPT, trained)
    heads = heads_by_hand(bare, by_hand, 1)[-1]
    said = torch.einsum("hm,hvm->hv", heads, torch.tensor(trained[1]))
    close(lens.probabilities[0, :, 0], said.softmax(-1).max(-1).values)
    close(total[1], said.sum(0))


def test_memory_injection(backend: object, bare: Any, by_hand: ByHand) -> None:
    ids, strength = [9, 40, 41], 2.5
    found = recipes.memory_injection(backend, PROMPT, ids, layer=1, strength=strength)
    memory = strength * bare.lm_head.weight.detach()[ids].sum(0)
    expected, _ = by_hand(PROMPT, {f"{layer(1)}.self_attn": adding(memory)})
    plain, _ = by_hand(PROMPT)
    close(found.steered_logits, expected[-1])
    close(found.plain_logits, plain[-1])
    assert np.abs(found.steered_logits - found.plain_logits).max() > 0.1


def test_activation_patching(backend: object, by_hand: ByHand) -> None:
    grid = recipes.activation_patching(backend, CLEAN, CORRUPT, answer=ANSWER, instead=INSTEAD)
    states = by_hand(CLEAN, keep=[layer(n) for n in LAYERS])[1]

    def measure(logits: torch.Tensor) -> float:
        return float(logits[-1, ANSWER] - logits[-1, INSTEAD])

    expected = [
        [
            measure(by_hand(CORRUPT, {layer(n): setting(states[layer(n)][p], p)})[0])
            for p in range(len(CORRUPT))
        ]
        for n in LAYERS
    ]
    close(grid.effect, expected)
    assert grid.effect.axes == {"layer": (0, 1, 2), "position": tuple(range(8))}
    close(grid.clean, measure(by_hand(CLEAN)[0]))
    close(grid.corrupt, measure(by_hand(CORRUPT)[0]))
    close(grid.restored[-1, -1], 1.0)


@pytest.mark.parametrize(("most", "num_programs"), [(24, 1), (16, 2), (8, 3), (3, 9)])
def test_a_grid_larger_than_a_program_goes_in_several_and_is_the_same(
    most: int, num_programs: int, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"answer": ANSWER, "instead": INSTEAD, "point": "layers.{i}.mid"}
    whole = recipes.activation_patching(oracle, CLEAN, CORRUPT, **how)
    assert len(whole.results) == 1
    monkeypatch.setattr(patching, "RUNS_A_PROGRAM", most)
    grid = recipes.activation_patching(oracle, CLEAN, CORRUPT, **how)
    assert len(grid.results) == num_programs
    assert all(len(result.runs) <= most + 2 for result in grid.results)
    assert (grid.effect.axes, grid.columns) == (whole.effect.axes, whole.columns)
    close(grid.effect, whole.effect)
    assert len({round(float(value), 5) for value in grid.effect.array.ravel()}) > 12


def test_attribution_patching_is_the_slope_of_activation_patching(
    backend: object, bare: Any, by_hand: ByHand
) -> None:
    grid = recipes.attribution_patching(backend, CLEAN, CORRUPT, answer=ANSWER, instead=INSTEAD)
    clean = by_hand(CLEAN, keep=[layer(n) for n in LAYERS])[1]
    corrupt = by_hand(CORRUPT, keep=[layer(n) for n in LAYERS])[1]
    step = 1e-3
    for n, p in ((0, 2), (1, 5), (2, 7)):
        change = step * (clean[layer(n)][p] - corrupt[layer(n)][p])
        up, _ = by_hand(CORRUPT, {layer(n): adding(change.numpy(), p)})
        down, _ = by_hand(CORRUPT, {layer(n): adding(-change.numpy(), p)})
        difference = (up - down)[-1] / (2 * step)
        slope = float(difference[ANSWER] - difference[INSTEAD])
        close(grid.effect.array[n, p] - grid.corrupt, slope, tolerance=2e-2)


def test_causal_tracing(backend: object, bare: Any, by_hand: ByHand) -> None:
    subject, sigma = "lens", 0.7
    grid = recipes.causal_tracing(
        backend, PROMPT, subject, answer=ANSWER, sigma=sigma, samples=1, positions=[0, 3, 11]
    )
    where = list(range(2, 6))
    with trace(backend, PROMPT) as t:
        place = t.embed.out[where]
        drawn = t.noise(place, sigma=sigma, seed=0)
        place += drawn
        noise = drawn.save()
    # Noise is checked for what it is; the rest is computed with it by hand.
    assert 0.5 < noise.value.std() / sigma < 1.5
    states = by_hand(PROMPT, keep=[layer(n) for n in LAYERS])[1]

    def blur(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, where] += torch.tensor(noise.value)
        return output

    def probability(**changes: Any) -> float:
        made = {name.replace("__", "."): change for name, change in changes.items()}
        return float(by_hand(PROMPT, made)[0][-1].softmax(-1)[ANSWER])

    close(grid.clean, probability())
    close(grid.corrupt, probability(model__embed_tokens=blur))
    for n in LAYERS:
        for column, p in enumerate((0, 3, 11)):
            restored = setting(states[layer(n)][p], p)
            changes = {"model.embed_tokens": blur, layer(n): restored}
            expected = float(by_hand(PROMPT, changes)[0][-1].softmax(-1)[ANSWER])
            close(grid.effect.array[n, column], expected)


def test_steering(backend: object, by_hand: ByHand) -> None:
    v = vector(HIDDEN, scale=2.0)
    found = recipes.steering(backend, PROMPT, v, layer=1, strength=1.5, max_tokens=4)
    expected, _ = by_hand(PROMPT, {layer(1): adding(1.5 * v)})
    close(found.steered_logits, expected[-1])
    assert found.plain != found.steered


def test_steering_where_a_condition_holds(backend: object, by_hand: ByHand) -> None:
    v, c = vector(HIDDEN, scale=3.0), vector(HIDDEN)
    h = by_hand(PROMPT, keep=[layer(0)])[1][layer(0)]
    cosines = torch.cosine_similarity(h, torch.tensor(c), dim=-1)
    threshold = float(cosines.median()) + 1e-4
    when = Condition(direction=c, threshold=threshold, layer=0)
    found = recipes.steering(backend, PROMPT, v, layer=1, when=when, max_tokens=1)
    gate = (cosines > threshold).float()
    assert 0 < gate.sum() < len(gate)
    expected, _ = by_hand(PROMPT, {layer(1): adding(gate[:, None] * torch.tensor(v))})
    close(found.steered_logits, expected[-1])


def test_steering_vector(backend: object, by_hand: ByHand) -> None:
    found = recipes.steering_vector(backend, ["yes!", "sure"], ["no no no"], layer=1)
    yes, sure, no = (
        by_hand(text, keep=[layer(1)])[1][layer(1)][-1] for text in ("yes!", "sure", "no no no")
    )
    close(found, (yes + sure) / 2 - no)


def test_zero_ablation_of_a_head_and_of_a_module(
    backend: object, bare: Any, by_hand: ByHand
) -> None:
    parts = [("layers.1.attn.head_out", 2), "layers.0.mlp.out"]
    found = recipes.ablation(backend, PROMPT, parts, answer=ANSWER)
    head = heads_by_hand(bare, by_hand, 1)[:, 2]
    without, _ = by_hand(PROMPT, {f"{layer(1)}.self_attn": adding(-head)})
    close(found.without[0], without[-1].log_softmax(-1)[ANSWER])
    without, _ = by_hand(PROMPT, {f"{layer(0)}.mlp": setting(0.0)})
    close(found.without[1], without[-1].log_softmax(-1)[ANSWER])
    close(found.plain, by_hand(PROMPT)[0][-1].log_softmax(-1)[ANSWER])


def test_mean_ablation(backend: object, by_hand: ByHand) -> None:
    over = ["some text", "and another"]
    found = recipes.ablation(
        backend, PROMPT, ["layers.1.mlp.out"], answer=ANSWER, kind="mean", over=over
    )
    module = f"{layer(1)}.mlp"
    means = [by_hand(text, keep=[module])[1][module].mean(0) for text in over]
    expected, _ = by_hand(PROMPT, {module: setting(sum(means) / 2)})
    close(found.without[0], expected[-1].log_softmax(-1)[ANSWER])
    with pytest.raises(RequestInvalid, match="over prompts"):
        recipes.ablation(backend, PROMPT, ["layers.1.mlp.out"], answer=ANSWER, kind="mean")


def test_probe(backend: object, by_hand: ByHand) -> None:
    weight, bias = vector(3, HIDDEN), vector(3)
    found = recipes.probe(backend, PROMPT, point="layers.1.out", weight=weight, bias=bias)
    h = by_hand(PROMPT, keep=[layer(1)])[1][layer(1)].numpy()
    close(found, h @ weight.T + bias, tolerance=1e-3)


@pytest.mark.parametrize("kind", ["relu, centred", "jumprelu"])
def test_sparse_autoencoder(backend: object, by_hand: ByHand, kind: str) -> None:
    entries = 64
    autoencoder = SparseAutoencoder(
        w_enc=vector(HIDDEN, entries, scale=0.2),
        b_enc=vector(entries, scale=0.1),
        w_dec=vector(entries, HIDDEN, scale=0.1),
        b_dec=vector(HIDDEN, scale=0.1),
        threshold=0.0 if kind == "relu, centred" else np.abs(vector(entries)),
        centred=kind == "relu, centred",
    )
    found = recipes.sparse_autoencoder(
        backend, PROMPT, autoencoder, point="layers.1.out", k=5, substitute=True
    )
    h = by_hand(PROMPT, keep=[layer(1)])[1][layer(1)].numpy()
    x = h - autoencoder.b_dec if autoencoder.centred else h
    features = x @ autoencoder.w_enc + autoencoder.b_enc
    features = np.where(features > autoencoder.threshold, features, 0.0)
    decoded = (features @ autoencoder.w_dec + autoencoder.b_dec).astype(np.float32)
    close(found.activations, -np.sort(-features)[:, :5], tolerance=1e-3)
    length = np.linalg.norm
    close(found.error, length(h - decoded, axis=-1) / length(h, axis=-1), tolerance=1e-3)
    close(found.logits, by_hand(PROMPT, {layer(1): setting(decoded)})[0][-1], tolerance=1e-3)


def test_rank_one_edit(backend: object, bare: Any, by_hand: ByHand) -> None:
    edit = recipes.rank_one_edit(
        backend,
        PROMPT,
        "it",
        answer=ANSWER,
        layer=1,
        keys=["other words entirely", "and then more"],
        num_steps=25,
        max_ratio=8.0,
    )
    assert edit.weight == "model.layers.1.mlp.down_proj.weight"
    with trace(backend, PROMPT) as t:
        t.overlay(edit)
        logits = t.logits[-1].save()
        key = t.layers[1].mlp.act[-1].save()
    plain = by_hand(PROMPT)[0][-1]
    assert logits.value.argmax() == ANSWER != int(plain.argmax())
    # By the definition the matrix moves along C⁻¹k, and maps the key to the value that was found.
    weight = bare.get_parameter(edit.weight)
    before = weight.detach().clone()
    with torch.no_grad():
        weight += torch.tensor(edit.u @ edit.v.T)
    try:
        close(logits, by_hand(PROMPT)[0][-1], tolerance=1e-3)
        others = [
            act_by_hand(bare, by_hand, text) for text in ("other words entirely", "and then more")
        ]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    rows = np.concatenate(others).astype(np.float64)
    moment = rows.T @ rows / len(rows)
    moment += 1e-2 * np.trace(moment) / len(moment) * np.eye(len(moment))
    direction = np.linalg.solve(moment, key.value.astype(np.float64))
    cosine = direction @ edit.v[:, 0] / np.linalg.norm(direction) / np.linalg.norm(edit.v)
    assert cosine > 0.999


def act_by_hand(bare: Any, by_hand: ByHand, text: str) -> np.ndarray:
    down = bare.get_submodule(f"{layer(1)}.mlp.down_proj")
    seen: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    by_hand(text)
    handle.remove()
    return seen[0].numpy()


class TestRefusals:
    def test_prompts_of_other_lengths_are_not_patched(self, backend: object) -> None:
        with pytest.raises(RequestInvalid, match="11 tokens"):
            recipes.activation_patching(
                backend, CLEAN, "longer dogs", answer=ANSWER, instead=INSTEAD
            )

    def test_answers_of_several_tokens_are_refused(self, backend: object) -> None:
        with pytest.raises(RequestInvalid, match="one token"):
            recipes.ablation(backend, PROMPT, ["layers.0.out"], answer=" Paris")

    def test_a_subject_that_is_not_there_is_refused(self, backend: object) -> None:
        with pytest.raises(RequestInvalid, match="does not have this text"):
            recipes.causal_tracing(backend, PROMPT, "moon", answer=ANSWER, sigma=1.0)

    def test_layers_and_positions_past_the_end_are_refused(self, backend: object) -> None:
        with pytest.raises(RequestInvalid, match="3 layers"):
            recipes.logit_lens(backend, PROMPT, layers=[3])
        with pytest.raises(RequestInvalid, match="8 tokens"):
            recipes.activation_patching(
                backend, CLEAN, CORRUPT, answer=ANSWER, instead=INSTEAD, positions=[8]
            )
