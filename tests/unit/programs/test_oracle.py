"""The oracle is held to transformers' own outputs, to closed forms and to small cases by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from fabric.messages import nodes as n
from fabric.messages.program import (
    Generate,
    LowRank,
    Normalized,
    Program,
    ProgramRun,
    Rows,
    Scaled,
    StartAt,
)
from fabric.testing.program_draws import draw_token, philox
from fabric.testing.program_ops import changed
from fabric.testing.tiny_models import PROMPT, Tiny, program_of

LAST = len(PROMPT) - 1


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def far(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() > 1e-2


def reads(*points: str, sel: n.Selector = n.ALL) -> list[n.Node]:
    nodes: list[n.Node] = []
    for point in points:
        nodes += [n.Read(at=point, sel=sel), n.Save(name=point, x=len(nodes))]
    return nodes


def points_of(tiny: Tiny, *, write: bool = False) -> list[str]:
    return [
        spec.pattern.replace("{i}", str(layer))
        for spec in tiny.manifest.points
        if spec.read and (spec.write or not write) and spec.pattern != "sample"
        for layer in (spec.layers or (0,))[:1]
    ]


# Reads


def test_without_nodes_it_generates_what_transformers_does(tiny: Tiny) -> None:
    ids = torch.tensor([PROMPT])
    expected = tiny.plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    outcome = tiny.run(tokens=6)
    assert outcome.tokens == expected[0, len(PROMPT) :].tolist()
    near(torch.stack(outcome.logits), tiny.logits((*PROMPT, *outcome.tokens))[LAST:-1])


@torch.no_grad()
def test_streams_and_patterns_are_those_that_transformers_returns(tiny: Tiny) -> None:
    expected = tiny.plain(torch.tensor([PROMPT]), output_hidden_states=True, output_attentions=True)
    saves = tiny.run(
        *reads("layers.0.in", "layers.0.attn.pattern", "layers.0.out", "layers.1.attn.pattern",
               "final.norm.out", "logits")
    ).saves  # fmt: skip
    near(saves["layers.0.in"], expected.hidden_states[0][0])
    near(saves["layers.0.out"], expected.hidden_states[1][0])
    near(saves["final.norm.out"], expected.hidden_states[-1][0])
    for layer in range(2):
        near(saves[f"layers.{layer}.attn.pattern"], expected.attentions[layer][0].transpose(0, 1))
    near(saves["logits"], expected.logits[0])


def test_parts_add_up_to_the_wholes(tiny: Tiny) -> None:
    at = "layers.1"
    saves = tiny.run(
        *reads(*(f"{at}.{p}" for p in ("in", "attn.v", "attn.scores", "attn.pattern", "attn.z",
                                       "attn.head_out", "attn.out", "mid", "mlp.out", "out")))
    ).saves  # fmt: skip
    saves = {name.removeprefix(f"{at}."): x for name, x in saves.items()}
    near(saves["attn.scores"].softmax(-1), saves["attn.pattern"])
    heads = saves["attn.z"].shape[1]
    v_THD = saves["attn.v"].repeat_interleave(heads // saves["attn.v"].shape[1], 1)
    near(torch.einsum("thk,khd->thd", saves["attn.pattern"], v_THD), saves["attn.z"])
    bias = dict(tiny.plain.named_parameters()).get(f"transformer.h.{at[-1]}.attn.c_proj.bias")
    near(saves["attn.head_out"].sum(1) + (0 if bias is None else bias), saves["attn.out"])
    if tiny.manifest.family != "gemma2":
        near(saves["in"] + saves["attn.out"], saves["mid"])
        near(saves["mid"] + saves["mlp.out"], saves["out"])


def test_the_parts_of_a_gated_mlp_are_what_they_are_called(llama: Tiny) -> None:
    saves = llama.run(*reads(*(f"layers.0.mlp.{p}" for p in ("gate", "up", "act", "out")))).saves
    gate, up, act, out = saves.values()
    near(gate / (1 + (-gate).exp()) * up, act)
    near(act @ llama.plain.model.layers[0].mlp.down_proj.weight.detach().T, out)


def test_the_router_sends_tokens_to_its_likeliest_experts(tinies: dict[str, Tiny]) -> None:
    saves = tinies["mixtral"].run(*reads("layers.0.moe.router", "layers.0.moe.experts")).saves
    router, experts = saves.values()
    assert torch.equal(router.topk(2).indices, experts)


# Writes


def test_writing_back_what_was_read_changes_nothing(tiny: Tiny) -> None:
    for point in points_of(tiny, write=True):
        outcome = tiny.run(n.Read(at=point), n.Write(at=point, x=0), tokens=3)
        near(torch.stack(outcome.logits), torch.stack(tiny.run(tokens=3).logits))


def test_a_write_anywhere_changes_the_answer(tiny: Tiny) -> None:
    for point in points_of(tiny, write=True):
        nodes = [
            n.Read(at=point),
            n.Noise(like=0, seed=1, sigma=1.0),
            n.Write(at=point, x=1, mode="add"),
        ]
        outcome = tiny.run(*nodes, tokens=1)
        far(outcome.logits[0], tiny.logits()[-1])


def test_a_vector_added_to_the_mlp_is_its_bias(tinies: dict[str, Tiny]) -> None:
    tiny, v = tinies["gpt2"], torch.linspace(-1, 1, 16)
    edited = copy.deepcopy(tiny.plain)
    edited.transformer.h[0].mlp.c_proj.bias.data += 2.5 * v
    program = program_of(
        n.Const(name="v"), n.Write(at="layers.0.mlp.out", x=0, mode="add", alpha=2.5), tokens=4
    )
    outcome = tiny.oracle.run(program, {"v": v})["r"]
    with torch.no_grad():
        expected = edited(torch.tensor([[*PROMPT, *outcome.tokens]])).logits[0]
    near(torch.stack(outcome.logits), expected[LAST:-1])


def test_a_head_that_is_set_to_nothing_is_a_head_without_weights(llama: Tiny) -> None:
    edited = copy.deepcopy(llama.plain)
    edited.model.layers[1].self_attn.o_proj.weight.data[:, 8:12] = 0
    with torch.no_grad():
        expected = edited(torch.tensor([PROMPT])).logits[0, -1]
    for point, shape in (("z", (1,)), ("head_out", (1,))):
        zero = n.Write(at=f"layers.1.attn.{point}", x=0, sel=n.Selector(heads=(2,)))
        near(llama.run(n.Zeros(shape=shape), zero, tokens=1).logits[0], expected)


def test_queries_of_nothing_attend_to_all_they_see_alike(llama: Tiny) -> None:
    nodes = [
        n.Zeros(shape=(1,)),
        n.Write(at="layers.0.attn.q_rope", x=0),
        n.Read(at="layers.0.attn.pattern"),
        n.Save(name="pattern", x=2),
    ]
    expected = torch.ones(6, 6).tril() / torch.arange(1.0, 7)[:, None]
    near(llama.run(*nodes).saves["pattern"], expected[:, None].expand(6, 4, 6))


def test_scores_that_are_written_stay_masked(llama: Tiny) -> None:
    nodes = [
        n.Zeros(shape=(1,), fill=7.0),
        n.Write(at="layers.0.attn.scores", x=0),
        n.Read(at="layers.0.attn.pattern"),
        n.Save(name="pattern", x=2),
    ]
    assert llama.run(*nodes).saves["pattern"].triu(1)[0, :, 1:].abs().max() == 0


H = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
X = torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    ("node", "args", "expected"),
    [
        (n.Write(at="a", x=0, alpha=0.5), {}, [[2.0, 2.0], [0.5, 1.0]]),
        (n.Write(at="a", x=0, mode="add", alpha=2.0), {}, [[5.0, 4.0], [2.0, 2.0]]),
        (n.Write(at="a", x=0, mode="add", norm="match"), {}, [[8.0, 4.0], [2.0, 2.0]]),
        (n.Write(at="a", x=0, mode="add", norm="preserve", alpha=-3.0), {},
         [[0.0, 5.0], [-3 * 2 / 13**0.5, 2 * 2 / 13**0.5]]),
        (n.Write(at="a", mode="scale", alpha=3.0), {}, [[9.0, 12.0], [0.0, 6.0]]),
        (n.Write(at="a", mode="scale", alpha=3.0, gate=0), {"gate": [0.0, 1.0]},
         [[3.0, 4.0], [0.0, 6.0]]),
        (n.Write(at="a", x=0, mask=0), {"mask": [[1.0], [0.0]]}, [[1.0, 0.0], [0.0, 2.0]]),
        (n.Project(at="a", v=0), {"v": [2.0, 0.0]}, [[0.0, 4.0], [0.0, 2.0]]),
        (n.Project(at="a", v=0, c=2.0, gate=0), {"v": [0.0, 9.0], "gate": [0.5]},
         [[3.0, 6.0], [0.0, 3.0]]),
        (n.Clamp(at="a", v=0, lo=-1.0, hi=1.0), {"v": [0.0, 1.0]}, [[3.0, 1.0], [0.0, 1.0]]),
        (n.Clamp(at="a", v=0, lo=5.0, hi=6.0, s=0.5), {"v": [1.0, 0.0]}, [[4.0, 4.0], [2.5, 2.0]]),
        (n.Skip(module="layers.0", x=0), {}, [[1.0, 0.0], [1.0, 0.0]]),
    ],
)  # fmt: skip
def test_changes_are_what_their_formulas_say(
    node: n.Node, args: dict[str, list[object]], expected: list[list[float]]
) -> None:
    given = {"x": X} | {name: torch.tensor(x) for name, x in args.items()}
    near(changed(node, H, given), torch.tensor(expected))


# Steps


def test_what_a_step_writes_is_remembered_as_if_it_were_in_the_prompt(tiny: Tiny) -> None:
    point = "layers.0.out" if tiny.manifest.family == "gpt2" else "layers.0.attn.k_rope"
    later = n.Selector(pos=(7, 8))
    scale = n.Write(at=point, mode="scale", alpha=4.0, sel=later)
    outcome = tiny.run(scale, tokens=5)
    whole = (*PROMPT, *outcome.tokens[:4])
    logits = tiny.run(scale, *reads("logits")[:1], n.Save(name="l", x=1), ids=whole).saves["l"]
    near(torch.stack(outcome.logits), logits[LAST:])
    far(torch.stack(outcome.logits), tiny.logits(whole)[LAST:])


def test_saves_are_joined_along_positions_or_stacked(llama: Tiny) -> None:
    decode = n.Selector(phase="decode")
    nodes: list[n.Node] = [
        n.Read(at="layers.0.in"),
        n.Save(name="all", x=0),
        n.Read(at="layers.0.attn.pattern"),
        n.Save(name="pattern", x=2),
        n.Read(at="layers.0.out", sel=decode),
        n.Reduce(op="sum", x=4),
        n.Save(name="sums", x=5),
        n.Save(name="mean", x=4, reduce="mean"),
        n.Save(name="streamed", x=4, stream=True),
        n.Read(at="layers.0.out", sel=n.Selector(pos=(-1, 0))) ,
        n.Save(name="two", x=9),
    ]  # fmt: skip
    # Nodes at one point may stand in any order among themselves.
    outcome = llama.run(*nodes, tokens=3)
    saves = outcome.saves
    whole = (*PROMPT, *outcome.tokens[:2])
    again = llama.run(*reads("layers.0.in", "layers.0.attn.pattern", "layers.0.out"), ids=whole)
    near(saves["all"], again.saves["layers.0.in"])
    near(saves["pattern"], again.saves["layers.0.attn.pattern"])
    out = again.saves["layers.0.out"]
    near(saves["sums"], out[6:].sum(1))
    near(saves["mean"], out[6:].mean(0))
    near(saves["two"], out[[LAST, 0]])
    assert [step for step, _ in outcome.streamed["streamed"]] == [1, 2]
    assert outcome.positions == {
        "all": [*range(8)], "pattern": [*range(8)], "two": [LAST, 0]
    }  # fmt: skip


def test_a_gate_that_latches_stays_open(llama: Tiny) -> None:
    def gates(*, latch: bool) -> Tensor:
        nodes = [
            n.Read(at="layers.0.in"),
            n.Const(name="first"),
            n.Einsum(args=(0, 1), equation="td,d->t"),
            n.Gate(x=2, threshold=0.0, latch=latch),
            n.Save(name="gate", x=3),
        ]
        first = torch.eye(16)[0]
        program = program_of(*nodes, tokens=4)
        return llama.oracle.run(program, {"first": first})["r"].saves["gate"]

    plain = gates(latch=False)
    assert 0 < plain.sum() < len(plain)
    assert torch.equal(gates(latch=True), plain.cummax(0).values)


def test_noise_is_of_its_seed_node_and_position_alone(llama: Tiny) -> None:
    def noise(ids: tuple[int, ...], sel: n.Selector = n.ALL) -> Tensor:
        nodes = [
            n.Read(at="embed.out", sel=sel),
            n.Noise(like=0, seed=5, sigma=2.0),
            n.Save(name="noise", x=1),
        ]
        return llama.run(*nodes, ids=ids).saves["noise"]

    drawn = noise(PROMPT)
    assert torch.equal(noise(PROMPT[::-1]), drawn)
    assert torch.equal(noise(PROMPT, n.Selector(pos=(4, 1))), drawn[[4, 1]])
    stream = np.random.Philox(key=[5, 1], counter=[0, 0, 0, 3])
    row = np.random.Generator(stream).standard_normal(16) * 2.0
    near(drawn[3], torch.tensor(row, dtype=torch.float32))
    assert 1.5 < drawn.std() < 2.5


@pytest.mark.parametrize(
    ("key", "counter", "block"),
    [
        (
            (0, 0),
            (0, 0, 0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (2**64 - 1, 2**64 - 1),
            (2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1),
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
    ],
)
def test_the_generator_gives_the_blocks_that_its_authors_published(
    key: tuple[int, int], counter: tuple[int, int, int, int], block: tuple[int, int, int, int]
) -> None:
    """Source: ``kat_vectors`` of Random123."""
    assert philox(key, counter) == block


def test_sampled_tokens_are_as_frequent_as_they_are_probable() -> None:
    logits, num = torch.tensor([1.0, 3.0, -torch.inf, 2.0]), 4000
    tokens = [
        draw_token(logits, Generate(temperature=1.5, seed=seed), step)
        for seed in range(40)
        for step in range(num // 40)
    ]
    frequencies = torch.bincount(torch.tensor(tokens), minlength=4) / num
    assert (frequencies - torch.softmax(logits / 1.5, 0)).abs().max() < 0.03


def test_a_token_that_is_set_is_the_one_that_goes_on(llama: Tiny) -> None:
    nodes = [n.Const(name="token"), n.Write(at="sample", x=0, sel=n.Selector(steps=(1, 2)))]
    program = program_of(*nodes, tokens=3)
    outcome = llama.oracle.run(program, {"token": torch.tensor([42])})["r"]
    assert outcome.tokens[1] == 42
    near(outcome.logits[2], llama.logits((*PROMPT, outcome.tokens[0], 42))[-1])


# Gradients


def test_the_gradient_of_a_logit_is_its_row_of_the_unembedding(llama: Tiny) -> None:
    nodes = [
        n.Read(at="logits", sel=n.Selector(pos="last", dims=(9,))),
        n.Slice(x=0, index=(0, 0)),
        n.Grad(scalar=1, wrt="final.norm.out", sel=n.Selector(pos="last")),
        n.Save(name="grad", x=2),
    ]
    near(llama.run(*nodes).saves["grad"][0], llama.plain.lm_head.weight[9].detach())


@pytest.mark.parametrize("point", ["embed.out", "layers.0.mid", "layers.0.attn.head_out"])
def test_gradients_are_the_slopes_of_small_steps(tiny: Tiny, point: str) -> None:
    torch.manual_seed(1)
    shape = (6, 4, 16) if "head_out" in point else (6, 16)
    direction = torch.randn(shape)
    to_last: list[n.Node] = [
        n.Read(at="logits", sel=n.Selector(pos="last")),
        n.Slice(x=0, index=(0, 9)),
    ]
    grad = [*to_last, n.Grad(scalar=1, wrt=point), n.Save(name="grad", x=2)]
    slope = (tiny.run(*grad).saves["grad"] * direction).sum()

    def logit(step: float) -> float:
        nodes = [n.Const(name="d"), n.Write(at=point, x=0, mode="add", alpha=step)]
        program = program_of(*nodes, tokens=1)
        return float(tiny.oracle.run(program, {"d": direction})["r"].logits[0][9])

    measured = (logit(1e-3) - logit(-1e-3)) / 2e-3
    assert float(slope) == pytest.approx(measured, rel=0.02, abs=5e-3)


# Weights and parts of the stack


def edited(tiny: Tiny, name: str, change: object) -> Tensor:
    copied = copy.deepcopy(tiny.plain)
    weight = copied.get_parameter(name)
    weight.data = change(weight.data)  # type: ignore[operator]
    with torch.no_grad():
        logits: Tensor = copied(torch.tensor([PROMPT])).logits[0, -1]
    return logits


U, V = torch.linspace(-1, 1, 32).reshape(16, 2), torch.linspace(0, 1, 48).reshape(24, 2)


@pytest.mark.parametrize(
    ("overlay", "change"),
    [
        (LowRank(weight="w", u="u", v="v", alpha=0.5), lambda w: w + 0.5 * U @ V.T),
        (Scaled(weight="w", k=-2.0), lambda w: -2.0 * w),
        (Rows(weight="w", index=(3, 0), x="x"),
         lambda w: torch.cat([V.T[1:], w[1:3], V.T[:1], w[4:]])),
        (Normalized(weight="w", axis=0), lambda w: w / w.norm(dim=0, keepdim=True)),
        (Normalized(weight="w", axis=1), lambda w: w / w.norm(dim=1, keepdim=True)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_overlays_are_edits_for_one_run(
    tinies: dict[str, Tiny], family: str, overlay: object, change: object
) -> None:
    tiny = tinies[family]
    # GPT-2's file has its matrices as [in, out].
    name, turn = {
        "llama": ("model.layers.0.mlp.down_proj.weight", lambda w: w),
        "gpt2": ("transformer.h.0.mlp.c_proj.weight", lambda w: w.T),
    }[family]
    inner = 24 if family == "llama" else 64
    constants = {"u": U, "v": torch.nn.functional.pad(V, (0, 0, 0, inner - 24))}
    constants["x"] = constants["v"].T.contiguous()
    if family == "gpt2" and not isinstance(overlay, Scaled | Normalized):
        wide = constants["v"]
        change = {
            "lowrank": lambda w: w + 0.5 * U @ wide.T,
            "rows": lambda w: torch.cat([wide.T[1:], w[1:3], wide.T[:1], w[4:]]),
        }[overlay.kind]  # type: ignore[attr-defined]
    overlay = overlay.model_copy(update={"weight": name})  # type: ignore[attr-defined]
    program = program_of(tokens=1, overlays=(overlay,))
    outcome = tiny.oracle.run(program, constants)["r"]
    expected = edited(tiny, name, lambda w: turn(change(turn(w))).contiguous())  # type: ignore[operator]
    near(outcome.logits[0], expected)
    far(outcome.logits[0], tiny.logits()[-1])
    near(tiny.run(tokens=1).logits[0], tiny.logits()[-1])


def test_parts_of_the_stack_make_the_whole(tiny: Tiny) -> None:
    first = ProgramRun(id="first", ids=PROMPT, stop_at=1, nodes=tuple(reads("layers.0.out")))
    second = ProgramRun(
        id="second",
        ids=PROMPT,
        start_at=StartAt(layer=1, x="first/layers.0.out"),
        nodes=tuple(reads("logits")),
    )
    outcomes = tiny.oracle.run(Program(runs=(second, first)))
    near(outcomes["second"].saves["logits"], tiny.logits())


def test_single_modules_do_what_they_do_in_the_model(tiny: Tiny) -> None:
    nodes: list[n.Node] = [
        n.Read(at="layers.1.in"),
        n.Module(module="layers.1", x=0),
        n.Norm(x=1),
        n.Unembed(x=2),
        n.Save(name="logits", x=3),
        n.Norm(x=0, site="layers.1.attn.norm"),
        n.Save(name="normed", x=5),
        n.Read(at="layers.1.attn.in"),
        n.Save(name="attn.in", x=7),
        n.TokenRows(op="model.embed", ids=PROMPT),
        n.Save(name="rows", x=9),
    ]
    saves = tiny.run(*nodes).saves
    near(saves["logits"], tiny.logits())
    near(saves["normed"], saves["attn.in"])
    near(saves["rows"], tiny.run(*reads("embed.out")).saves["embed.out"])


def test_weights_are_read_under_the_overlay(llama: Tiny) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    nodes = [
        n.WeightRead(name=name, index=((1, 3), 0)),
        n.Save(name="slice", x=0),
        n.WeightRead(name=name, stats=True),
        n.Save(name="stats", x=2),
    ]
    saves = llama.run(*nodes, overlays=(Scaled(weight=name, k=2.0),)).saves
    weight = 2.0 * llama.plain.get_parameter(name).detach()
    near(saves["slice"], weight[1:3, 0])
    expected = [weight.mean(), weight.std(correction=0), weight.min(), weight.max(), weight.norm()]
    near(saves["stats"], torch.stack(expected))


def test_a_run_takes_what_another_saved(llama: Tiny) -> None:
    clean = ProgramRun(id="clean", ids=PROMPT, nodes=tuple(reads("layers.0.out")))
    patched = ProgramRun(
        id="patched",
        ids=PROMPT[::-1],
        gen=Generate(max_tokens=1),
        nodes=(
            n.Saved(run="clean", save="layers.0.out"),
            n.Write(at="layers.0.out", x=0),
            n.Saved(run="clean", save="layers.0.out", positions=(5, 0), mean=True),
            n.Save(name="mean", x=2),
        ),
    )
    outcomes = llama.oracle.run(Program(runs=(patched, clean)))
    near(outcomes["patched"].logits[0], llama.logits()[-1])
    kept = outcomes["clean"].saves["layers.0.out"]
    near(outcomes["patched"].saves["mean"], (kept[5] + kept[0]) / 2)
