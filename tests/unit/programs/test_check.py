"""Programs are refused before they run, at the node that is wrong; what is known of the rest."""

from __future__ import annotations

import time

import pytest
from pydantic import ValidationError

from fabric.errors import (
    FabricError,
    PointRefused,
    PointUnknown,
    ProgramInvalid,
    ProgramTooLarge,
)
from fabric.messages import nodes as n
from fabric.messages.points import PointManifest
from fabric.messages.program import (
    Generate,
    LowRank,
    Normalized,
    Program,
    ProgramLimits,
    ProgramRun,
    Rows,
    Scaled,
    StartAt,
)
from fabric.programs import CAPS, Checked, ProgramCaps, TensorSpec, check
from fabric.testing.tiny_models import PROMPT, Tiny, program_of

CONSTANTS = {
    "h": TensorSpec((16,), "float32"),
    "six": TensorSpec((6, 16), "float32"),
    "five": TensorSpec((5, 16), "float32"),
    "ids": TensorSpec((2,), "int64"),
    "id": TensorSpec((1,), "int64"),
    "u": TensorSpec((16, 2), "float32"),
    "v": TensorSpec((24, 2), "float32"),
    "bf": TensorSpec((16,), "bfloat16"),
    "mask": TensorSpec((16,), "bool"),
}
OUT = n.Read(at="layers.0.out")
DECODE = n.Selector(phase="decode")
DOWN = "model.layers.0.mlp.down_proj.weight"


def checked(program: Program, manifest: PointManifest, **changes: object) -> Checked:
    return check(program, manifest, CONSTANTS, **changes)  # type: ignore[arg-type]


def const(name: str) -> n.Const:
    return n.Const(name=name)


def at(point: str = "layers.0.out", **changes: object) -> n.Write:
    return n.Write.model_validate({"at": point, "x": 0} | changes)


REFUSED: dict[str, tuple[list[n.Node], dict[str, object]]] = {
    "does not come before": ([n.Unary(op="relu", x=0)], {}),
    "does not come before it": ([OUT, n.Unary(op="relu", x=5)], {}),
    "a write, which gives no value": ([const("h"), at(), n.Save(name="a", x=1)], {}),
    "saves 'a' twice": ([OUT, n.Save(name="a", x=0), n.Save(name="a", x=0)], {}),
    "no constant 'nothing'": ([const("nothing")], {}),
    "order of the forward pass": ([n.Read(at="layers.1.in"), OUT], {}),
    "no parameter 'w'": ([n.WeightRead(name="w")], {}),
    "there is no run 'other'": ([n.Saved(run="other", save="a")], {}),
    "waits for itself": ([n.Saved(run="r", save="a")], {}),
    "select none of the run's 1 steps": ([n.Read(at="logits", sel=DECODE)], {}),
    "not all among the 6": ([n.Read(at="logits", sel=n.Selector(pos=(6,)))], {}),
    "not all among the 6 ": ([n.Read(at="logits", sel=n.Selector(pos=(-7,)))], {}),
    "a position stands twice": ([n.Read(at="logits", sel=n.Selector(pos=(5, -1)))], {}),
    "list of positions is empty": ([n.Read(at="logits", sel=n.Selector(pos=()))], {}),
    "not all run in the steps": (
        [n.Read(at="logits", sel=n.Selector(phase="prefill", pos=(6,)))], {"tokens": 3}
    ),
    "has no heads": ([n.Read(at="logits", sel=n.Selector(heads=(0,)))], {}),
    "heads 4 is not one of the 4": (
        [n.Read(at="layers.0.attn.z", sel=n.Selector(heads=(4,)))], {}
    ),
    "dims 61 is not one of the 61": ([n.Read(at="logits", sel=n.Selector(dims=(61,)))], {}),
    "nothing is sampled": ([n.Read(at="sample")], {}),
    "x has the shape [5, 16], which does not fit [6, 16]": ([const("five"), at()], {}),
    "x has the shape [6, 16], which does not fit [1, 16]": (
        [const("six"), at(sel=n.Selector(pos="last"))], {}
    ),
    "x has the shape [6, 16], which does not fit [T, 16]": ([const("six"), at()], {"tokens": 2}),
    "floating-point numbers and was given int64": ([const("ids"), at()], {}),
    "mask has the shape": ([const("h"), const("six"), at("logits", mask=1, mode="scale", x=None)],
                           {}),
    "must have one number a token": ([const("six"), const("h"), at(gate=0, x=1)], {}),
    "lo 2.0 is over hi 1.0": ([const("h"), n.Clamp(at="layers.0.out", v=0, lo=2, hi=1)], {}),
    "v has the shape [6, 16], not the axis of": (
        [const("six"), n.Project(at="layers.0.attn.z", v=0)], {}
    ),
    "no module": ([const("h"), n.Skip(module="layers.0.attn.q", x=0)], {}),
    "skipped as a whole": (
        [const("h"), n.Skip(module="layers.0", x=0, sel=n.Selector(dims=(1,)))], {}
    ),
    "which does not fit [6, 16]": ([const("five"), n.Skip(module="layers.0.mlp", x=0)], {}),
    "has no value yet": (
        [n.Read(at="layers.0.out", sel=DECODE), at(sel=n.Selector(phase="prefill"))],
        {"tokens": 3},
    ),
    "can be set, and nothing else": ([const("id"), at("sample", mode="add")], {"tokens": 1}),
    "do not broadcast": ([OUT, const("five"), n.Binary(op="add", x=0, y=1)], {}),
    "takes floating-point": ([const("ids"), n.Unary(op="exp", x=0)], {}),
    "truth values": ([const("mask"), n.Binary(op="mul", x=0, y=0)], {}),
    "must be of one size and are 16 and 5": (
        [const("six"), const("five"), n.Matmul(x=0, y=1)], {}
    ),
    "matmul takes two axes": ([const("h"), n.Matmul(x=0, y=0)], {}),
    "linear takes a weight": ([const("h"), n.Linear(x=0, weight=0)], {}),
    "has 2 operands and 1": ([const("h"), n.Einsum(args=(0,), equation="a,a->a")], {}),
    "is not the shape": ([const("h"), n.Einsum(args=(0,), equation="ab->a")], {}),
    "letters of its operands": ([const("six"), n.Einsum(args=(0,), equation="ab->aa")], {}),
    "axis 2 is not one of the 2 axes": ([OUT, n.Reduce(op="sum", x=0, axes=(2,))], {}),
    "an axis stands twice": ([OUT, n.Reduce(op="sum", x=0, axes=(1, -1))], {}),
    "argmax takes one axis": ([OUT, n.Reduce(op="argmax", x=0)], {}),
    "max of nothing": ([n.Zeros(shape=(0,)), n.Reduce(op="max", x=0)], {}),
    "the 17 largest": ([OUT, n.TopK(x=0, k=17)], {}),
    "index 16 is out of range": ([OUT, n.Slice(x=0, index=(None, 16))], {}),
    "3 indices are too many": ([OUT, n.Slice(x=0, index=(0, 0, 0))], {}),
    "index 1 is out of range for an axis of T": (
        [OUT, n.Slice(x=0, index=(1,))], {"tokens": 2}
    ),
    "index -7 is out of range": ([OUT, n.Gather(x=0, indices=(0, -7))], {}),
    "indices are int64": ([OUT, const("h"), n.Gather(x=0, by=1)], {}),
    "values of one dtype": ([const("h"), const("bf"), n.Concat(op="concat", args=(0, 1))], {}),
    "have not as many axes": ([const("h"), const("u"), n.Concat(op="stack", args=(0, 1))], {}),
    "cannot be made [5, 16]": ([OUT, n.Reshape(op="reshape", x=0, shape=(5, 16))], {}),
    "use -1": ([OUT, n.Reshape(op="reshape", x=0, shape=(6, 16))], {"tokens": 2}),
    "is no order of": ([OUT, n.Reshape(op="permute", x=0, shape=(0, 0))], {}),
    "more than 8 axes": (
        [n.Zeros(shape=(1,) * 8), n.Concat(op="stack", args=(0,))], {}
    ),
    "its last axis must be 16": ([n.Read(at="layers.0.mlp.act"), n.Norm(x=0)], {}),
    "is no norm": ([OUT, n.Norm(x=0, site="layers.0.mlp")], {}),
    "the layers are 0 to 1": ([OUT, n.Module(module="layers.2", x=0)], {}),
    "no layer and no matrix": ([OUT, n.Module(module="model.norm", x=0)], {}),
    "token 61 is not in the vocabulary": (
        [n.TokenRows(op="model.embed", ids=(61,))], {}
    ),
    "takes a single number": ([OUT, n.Grad(scalar=0, wrt="layers.0.in")], {}),
    "depends on nothing read at or after": (
        [OUT, n.Reduce(op="sum", x=0), n.Grad(scalar=1, wrt="layers.1.in")], {}
    ),
    "depends on nothing read": (
        [n.Zeros(shape=()), n.Grad(scalar=0, wrt="layers.1.in")], {}
    ),
    "max_tokens is 0": (
        [OUT, n.Reduce(op="sum", x=0), n.Grad(scalar=1, wrt="layers.0.in")], {"tokens": 1}
    ),
    "comes of a gradient": (
        [OUT, n.Reduce(op="sum", x=0), n.Grad(scalar=1, wrt="layers.0.in"), at("logits", x=2)], {}
    ),
    "changes from step to step": (
        [n.Read(at="layers.0.attn.pattern"), n.Binary(op="mul", x=0, k=2.0),
         n.Save(name="a", x=1)],
        {"tokens": 2},
    ),
    "takes an axis away": ([n.Zeros(shape=()), n.Save(name="a", x=0, reduce="sum")], {}),
    "artifact": ([n.Artifact(id="art_" + "0" * 32, run="a", save="b")], {}),
    "comes before layer 1": ([OUT], {"start_at": StartAt(layer=1, x="six")}),
    "a run starts with a float [6, 16]": ([], {"start_at": StartAt(layer=1, x="five")}),
    "neither a constant": ([], {"start_at": StartAt(layer=1, x="other/none")}),
    "cannot start at layer 2": ([], {"start_at": StartAt(layer=2, x="six")}),
    "one token at most": ([], {"start_at": StartAt(layer=0, x="six"), "tokens": 2}),
    "is not reached": ([n.Read(at="logits")], {"stop_at": 1}),
    "cannot stop at layer 3": ([], {"stop_at": 3}),
    "generates nothing": ([], {"stop_at": 1, "tokens": 1}),
    "U [16, 2] and V [24, 2] must be": (
        [], {"overlays": (LowRank(weight="lm_head.weight", u="u", v="v"),)}
    ),
    "is no matrix": ([], {"overlays": (Normalized(weight="model.norm.weight"),)}),
    "its rows must be among the 16": ([], {"overlays": (Rows(weight=DOWN, index=(16,), x="h"),)}),
    "'h' is not [1, 24]": ([], {"overlays": (Rows(weight=DOWN, index=(0,), x="h"),)}),
    "token 99 is not": ([], {"ids": (99,)}),
    "it needs 65 tokens": ([], {"ids": (1,) * 60, "tokens": 5}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(reason: str, manifest: PointManifest) -> None:
    nodes, changes = REFUSED[reason]
    with pytest.raises(ProgramInvalid) as caught:
        checked(program_of(*nodes, **changes), manifest)  # type: ignore[arg-type]
    assert reason.strip() in caught.value.message
    assert caught.value.detail["run"] == "r"
    if nodes and "waits for itself" not in reason and not (changes.keys() - {"tokens"}):
        assert caught.value.detail["node"] == len(nodes) - 1


def test_points_are_refused_with_the_model_s_reason(tinies: dict[str, Tiny]) -> None:
    mixtral = tinies["mixtral"].manifest
    with pytest.raises(PointRefused, match=r"Node 0 of the run 'r' wants to read .*fused"):
        checked(program_of(n.Read(at="layers.0.mlp.act")), mixtral)
    with pytest.raises(PointRefused, match=r"write .*together with its logits"):
        checked(program_of(const("h"), at("layers.1.moe.router")), mixtral)
    with pytest.raises(PointRefused, match="not rotary"):
        checked(program_of(n.Read(at="layers.0.attn.q_rope")), tinies["gpt2"].manifest)
    with pytest.raises(PointUnknown, match="Node 1 of the run 'r'"):
        checked(program_of(OUT, n.Read(at="layers.0.nothing")), mixtral)


def shapes(program: Program, manifest: PointManifest) -> list[tuple[int | str, ...]]:
    return [node.shape for node in checked(program, manifest).runs[0].nodes]


def test_shapes_have_names_where_they_change_or_are_not_known(manifest: PointManifest) -> None:
    nodes = [
        n.Read(at="layers.0.attn.pattern"),
        n.Read(at="layers.0.attn.z", sel=n.Selector(heads=(3, 1), dims=(0,))),
        OUT,
        n.Save(name="out", x=2),
        n.Read(at="logits", sel=n.Selector(pos="last")),
        n.TopK(x=4, k=10),
        n.Save(name="top", x=5),
        n.Save(name="pattern", x=0),
    ]
    assert shapes(program_of(*nodes), manifest) == [
        (6, 4, 6), (6, 2, 1), (6, 16), (6, 16), (1, 61), (1, 10), (1, 10), (6, 4, 6)
    ]  # fmt: skip
    assert shapes(program_of(*nodes, tokens=3), manifest) == [
        ("T", 4, "S[0:3]"), ("T", 2, 1), ("T", 16), (8, 16), (1, 61), (1, 10), (3, 10), (8, 4, 8)
    ]  # fmt: skip
    text = program_of(*nodes, ids=None, text="a town")  # type: ignore[arg-type]
    assert shapes(text, manifest)[2] == ("T[prompt]", 16)


def test_a_text_is_bounded_and_checked_again_once_it_is_tokens(manifest: PointManifest) -> None:
    nodes = [const("six"), at(), OUT, n.Save(name="a", x=2)]
    text = program_of(*nodes, ids=None, text="six tokens")  # type: ignore[arg-type]
    bound = checked(text, manifest)
    exact = checked(program_of(*nodes), manifest)
    assert exact.result_bytes <= bound.result_bytes
    assert exact.num_flops <= bound.num_flops
    tokens = text.runs[0].model_copy(update={"text": None, "ids": PROMPT[:4]})
    with pytest.raises(ProgramInvalid, match=r"\[6, 16\], which does not fit \[4, 16\]"):
        checked(text.model_copy(update={"runs": (tokens,)}), manifest)
    short = program_of(*nodes, ids=None, text="four")  # type: ignore[arg-type]
    with pytest.raises(ProgramInvalid, match="does not fit"):
        checked(short, manifest)
    span = n.Selector(pos=n.Span(span="moon"))
    with pytest.raises(ProgramInvalid, match="'moon' 0 times"):
        checked(program_of(n.Read(at="logits", sel=span), ids=None, text="six"), manifest)  # type: ignore[arg-type]


def test_lanes_scopes_and_what_the_cache_must_know(manifest: PointManifest) -> None:
    read = program_of(n.Read(at="layers.1.out", sel=n.Selector(pos=(-2, 3))), tokens=2)
    steered = program_of(const("h"), at(sel=DECODE, mode="add"), tokens=2)
    patched = program_of(const("h"), at(), n.Read(at="layers.1.attn.pattern", sel=DECODE), tokens=2)
    gradient = program_of(OUT, n.Reduce(op="sum", x=0), n.Grad(scalar=1, wrt="layers.0.in"))
    weights = program_of(overlays=(Scaled(weight=DOWN, k=2.0),))
    private = program_of(overlays=(Normalized(weight=DOWN),))
    part = program_of(start_at=StartAt(layer=1, x="six"))
    known = [
        (result.scopes, result.lane, run.affects_prefill, run.earliest_read)
        for result in (
            checked(program, manifest)
            for program in (read, steered, patched, gradient, weights, private, part)
        )
        for run in result.runs
    ]
    assert known == [
        ({"read"}, "boundary", False, 3),
        ({"write"}, "boundary", False, None),
        ({"read", "write"}, "recompute", True, None),
        ({"read", "gradient"}, "autograd", False, 0),
        ({"weights"}, "boundary", True, None),
        ({"weights"}, "autograd", True, None),
        ({"write"}, "graph", True, None),
    ]


def runs_of(*runs: tuple[str, list[n.Node]]) -> Program:
    return Program(
        runs=tuple(ProgramRun(id=name, ids=PROMPT, nodes=tuple(nodes)) for name, nodes in runs)
    )


def test_runs_come_after_those_that_they_take_from(manifest: PointManifest) -> None:
    take = n.Saved(run="a", save="x", positions=(0, -1))
    clean = [OUT, n.Save(name="x", x=0)]
    patched = [take, at(sel=n.Selector(pos=(2, 3)))]
    result = checked(runs_of(("b", patched), ("a", clean)), manifest)
    assert [(run.run.id, run.depends_on) for run in result.runs] == [("a", ()), ("b", ("a",))]
    assert result.runs[1].nodes[0].shape == (2, 16)
    for program, reason in (
        (runs_of(("a", clean), ("a", [])), "two runs have this id"),
        (runs_of(("a", [n.Saved(run="b", save="x")]), ("b", [take])), "waits for itself"),
        (runs_of(("a", []), ("b", [take])), "saves no 'x'"),
        (runs_of(("a", [OUT, n.Save(name="x", x=0, stream=True)]), ("b", [take])), "streamed"),
        (runs_of(("a", clean), ("b", [n.Saved(run="a", save="x", positions=(6,))])), "position 6"),
    ):
        with pytest.raises(ProgramInvalid, match=reason):
            checked(program, manifest)


# Bounds


def test_flops_are_counted_as_by_hand(llama: Tiny) -> None:
    """Six tokens: 2 a parameter and token, 4 a layer, size and pair; a product of [6, 16, 61]."""
    nodes = [OUT, n.Unembed(x=0)]
    forward = 2 * llama.manifest.num_parameters * 6 + 4 * 2 * 16 * 21
    plain = checked(program_of(), llama.manifest).num_flops
    assert plain == forward
    with_unembed = checked(program_of(*nodes), llama.manifest).num_flops
    product = 2 * 6 * 16 * 61
    assert product <= with_unembed - forward <= 2 * product


def test_results_are_bounded_after_their_reduction(manifest: PointManifest) -> None:
    def size(**changes: object) -> int:
        save = n.Save.model_validate({"name": "a", "x": 0} | changes)
        return checked(program_of(n.Read(at="logits"), save, tokens=9), manifest).result_bytes

    assert 14 * 61 * 4 <= size() <= 14 * 61 * 4 + 9 * 1024
    assert 14 * 61 * 2 <= size(dtype="bfloat16") < size()
    assert 61 * 4 <= size(reduce="mean") < size(dtype="bfloat16")
    assert size() <= size(stream=True) + 14 * 12


@pytest.mark.parametrize(
    ("nodes", "changes", "cap"),
    [
        ([n.Zeros(shape=(2**31 - 1, 2**31 - 1))], {}, "value bytes"),
        ([n.Zeros(shape=(2**30,)), n.Save(name="a", x=0)], {}, "value bytes"),
        ([n.Zeros(shape=(256, 256)), n.Einsum(args=(0, 0, 0, 0), equation="ab,cd,bd,ac->")], {},
         "value bytes"),
        ([n.Zeros(shape=(2**20,)), *(n.Concat(op="concat", args=(i, i)) for i in range(40))], {},
         "value bytes"),
        ([n.Zeros(shape=(4096, 4096)), *(n.Matmul(x=0, y=0) for _ in range(8))], {"caps": 10**11},
         "flops"),
        ([], {"tokens": 50, "generated": 49}, "generated tokens"),
        ([n.Zeros(shape=(2**20,)), n.Save(name="a", x=0)], {"result": 2**20},
         "limits.result_bytes"),
    ],
)  # fmt: skip
def test_what_is_too_large_says_which_cap(
    nodes: list[n.Node], changes: dict[str, int], cap: str, manifest: PointManifest
) -> None:
    limits = ProgramLimits(result_bytes=changes.get("result", 2**30))
    program = program_of(*nodes, tokens=changes.get("tokens", 0))
    caps = ProgramCaps(
        flops=changes.get("caps", 10**19), generated_tokens=changes.get("generated", 10**6),
        result_bytes=2**40,
    )  # fmt: skip
    with pytest.raises(ProgramTooLarge) as caught:
        check(program.model_copy(update={"limits": limits}), manifest, CONSTANTS, caps=caps)
    assert caught.value.detail["cap"] == cap
    assert caught.value.http_status == 413


def test_tiers_allow_more_and_more() -> None:
    tiers = [CAPS[tier] for tier in ("interactive", "standard", "batch")]
    for name in ProgramCaps.__dataclass_fields__:
        allowed = [getattr(tier, name) for tier in tiers]
        assert allowed == sorted(allowed)


def test_ten_thousand_nodes_take_a_bounded_time(manifest: PointManifest) -> None:
    with pytest.raises(ValidationError):
        program_of(*(OUT for _ in range(10_000)))
    deep: list[n.Node] = [OUT, *(n.Binary(op="add", x=i, y=i) for i in range(4000))]
    wide: list[n.Node] = [
        n.Write(at=f"layers.{i % 2}.out", mode="scale", sel=n.Selector(steps=(i, i + 1)))
        for i in range(40)
    ]
    program = Program(
        runs=tuple(
            ProgramRun(id=f"r{i}", ids=PROMPT, gen=Generate(max_tokens=40), nodes=tuple(nodes))
            for i, nodes in enumerate([deep, deep, deep, wide])
        )
    )
    began = time.process_time()
    result = checked(program, manifest)
    assert time.process_time() - began < 10
    assert result.runs[0].nodes[-1].shape == ("T", 16)
    with pytest.raises(ProgramTooLarge, match="nodes"):
        checked(program, manifest, caps=ProgramCaps(nodes=10_000))


def test_a_thousand_runs_in_a_row_are_no_recursion(manifest: PointManifest) -> None:
    chain: list[tuple[str, list[n.Node]]] = [("r0", [const("h"), n.Save(name="x", x=0)])]
    for i in range(1, 1000):
        chain.append((f"r{i}", [n.Saved(run=f"r{i - 1}", save="x"), n.Save(name="x", x=0)]))
    result = checked(runs_of(*reversed(chain)), manifest)
    assert [run.run.id for run in result.runs] == [f"r{i}" for i in range(1000)]


def test_names_of_names_stay_short(manifest: PointManifest) -> None:
    nodes: list[n.Node] = [OUT, *(n.Concat(op="concat", args=(i, i)) for i in range(12))]
    shape = shapes(program_of(*nodes, tokens=4), manifest)[-1]
    assert len(str(shape[0])) <= 64


def test_errors_travel(manifest: PointManifest) -> None:
    with pytest.raises(ProgramInvalid) as caught:
        checked(program_of(const("nothing")), manifest)
    error = caught.value
    again = FabricError.rebuild(error.code, error.message, error.detail)
    assert (type(again), str(again), again.http_status) == (ProgramInvalid, str(error), 400)
