"""What nodes compute, how runs go on and depend on each other, against the oracle."""

from __future__ import annotations

import pytest
import torch

from fabric.messages import Request, Sampling, Task, TokensInput

LAST = {"pos": "last"}


@pytest.fixture(scope="module")
def constants():
    torch.manual_seed(5)
    return {
        "v": torch.randn(48),
        "w": torch.randn(10, 48),
        "b": torch.randn(10),
        "rows": torch.randn(7, 48),
        "mask": (torch.rand(7, 48) > 0.5).float(),
        "half": torch.randn(48).bfloat16(),
    }


class Nodes(list):
    """A list of nodes; ``add`` returns a node's index."""

    def add(self, op: str, **fields) -> int:
        self.append({"op": op, **fields})
        return len(self) - 1

    def save(self, name: str, x: int, **fields) -> None:
        self.add("save", name=name, x=x, **fields)


def same(outcome, expected, tolerance=1e-4):
    assert outcome.end.type == "finished", outcome.end.failure.message
    for run, of_run in expected.items():
        saves = outcome.saves.get(run, {})
        assert saves.keys() == of_run.saves.keys()
        for name, value in of_run.saves.items():
            assert saves[name].dtype == value.dtype, name
            assert saves[name].shape == value.shape, name
            allowed = 2e-2 if value.dtype in (torch.float16, torch.bfloat16) else tolerance
            assert torch.allclose(
                saves[name].double(), value.double(), atol=allowed, rtol=allowed
            ), name
        assert outcome.positions.get(run, {}) == of_run.positions


CHANGES = {
    "set": {"op": "write", "mode": "set", "x": "v", "alpha": 0.7},
    "set, masked": {"op": "write", "mode": "set", "x": "rows", "mask": "mask"},
    "add, matched": {"op": "write", "mode": "add", "x": "v", "norm": "match", "alpha": 0.5},
    "add, preserved": {"op": "write", "mode": "add", "x": "half", "norm": "preserve"},
    "add, masked": {"op": "write", "mode": "add", "x": "v", "mask": "mask", "alpha": 3.0},
    "scale": {"op": "write", "mode": "scale", "alpha": -1.5},
    "scale, gated": {"op": "write", "mode": "scale", "alpha": 3.0, "gate": "gate"},
    "add, gated": {"op": "write", "mode": "add", "x": "v", "gate": "gate", "alpha": 3.0},
    "remove": {"op": "project", "v": "v"},
    "double, gated": {"op": "project", "v": "v", "c": 2.0, "gate": "gate"},
    "clamp": {"op": "clamp", "v": "v", "lo": -0.1, "hi": 0.2, "s": 0.9},
    "clamp, gated": {"op": "clamp", "v": "v", "lo": 0.5, "hi": 0.9, "gate": "gate"},
    "skip": {"op": "skip", "module": "layers.0.mlp", "x": "rows"},
    "skip a layer": {"op": "skip", "module": "layers.0", "x": "rows"},
    "dims": {"op": "write", "mode": "scale", "alpha": 0.0, "sel": {"dims": [1, 5, 40]}},
    "noise": {"op": "write", "mode": "add", "x": "noise"},
}


def test_every_change_is_what_its_formula_says(rig_of, program_of, constants):
    rig = rig_of()
    runs = []
    for name, change in CHANGES.items():
        nodes = Nodes()
        values = {c: nodes.add("const", name=c) for c in ("v", "rows", "mask", "half")}
        if "pos" not in change.get("sel", {}):
            change = {**change, "sel": {"phase": "prefill", **change.get("sel", {})}}
        h = nodes.add("read", at="layers.0.in", sel={"phase": "prefill"})
        values["noise"] = nodes.add("noise", like=h, seed=7, sigma=0.8)
        along = nodes.add("cosine", x=h, y=values["v"])
        values["gate"] = nodes.add("gate", x=along, cmp="gt", threshold=0.0)
        refs = {k: values[x] for k, x in change.items() if isinstance(x, str) and x in values}
        at = {} if change["op"] == "skip" else {"at": "layers.0.mid"}
        nodes.append({**change, **refs, **at})
        after = nodes.add("read", at="layers.1.out")
        nodes.save("after", after)
        runs.append({"id": name, "nodes": nodes, "gen": {"max_tokens": 2}})
    program = program_of(*runs, constants=constants)
    same(rig.run(program), rig.expect(program, constants))


def test_pure_nodes_equal_the_oracle(rig_of, program_of, constants):
    rig = rig_of()
    n = Nodes()
    v, w, b = (n.add("const", name=name) for name in ("v", "w", "b"))
    h = n.add("read", at="layers.1.out")
    probe = n.add("linear", x=h, weight=w, bias=b)
    n.save("probe", n.add("jumprelu", x=probe, threshold=0.3))
    for op in ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "exp", "abs", "neg"):
        n.save(op, n.add(op, x=probe))
    for op in ("add", "sub", "mul", "div", "maximum", "minimum", "gt", "le"):
        n.save(op, n.add(op, x=h, y=v))
        n.save(f"{op} k", n.add(op, x=h, k=0.5))
    for op in ("sum", "mean", "max", "min", "var", "norm", "logsumexp"):
        n.save(f"{op} dims", n.add(op, x=h, axes=[-1]))
        n.save(f"{op} tokens", n.add(op, x=h, axes=[0], keepdim=True))
        n.save(f"{op} all", n.add(op, x=h))
    n.save("argmax", n.add("argmax", x=h, axes=[1]))
    n.save("softmax", n.add("softmax", x=probe))
    n.save("log_softmax", n.add("log_softmax", x=probe, axis=0))
    n.save("topk", n.add("topk", x=probe, k=3))
    n.save("topk ids", n.add("topk", x=probe, k=3, part="indices"))
    flags = n.add("gt", x=probe, k=0.0)
    n.save("where", n.add("where", cond=flags, x=probe, y=b))
    n.save("slice", n.add("slice", x=h, index=[-1, [2, 9]]))
    n.save("range", n.add("slice", x=h, index=[None, [1, 3]]))
    n.save("gather", n.add("gather", x=h, axis=1, indices=[3, -1]))
    best = n.add("topk", x=h, k=2, part="indices")
    n.save("gathered", n.add("gather", x=h, axis=1, by=best))
    n.save("concat", n.add("concat", args=[probe, probe], axis=1))
    n.save("stack", n.add("stack", args=[h, h], axis=1))
    split = n.add("reshape", x=h, shape=[-1, 4, 12])
    n.save("reshape", split)
    n.save("permute", n.add("permute", x=split, shape=[0, 2, 1]))
    n.save("einsum", n.add("einsum", args=[split, split], equation="tab,tcb->tac"))
    turned = n.add("permute", x=w, shape=[1, 0])
    n.save("matmul", n.add("matmul", x=h, y=turned))
    n.save("cast", n.add("cast", x=h, dtype="float16"))
    n.save("as half", h, dtype="bfloat16")
    n.save("zeros", n.add("zeros", shape=[2, 3], fill=1.5))
    n.save("normed", n.add("model.norm", x=h))
    n.save("attn norm", n.add("model.norm", x=v, site="layers.1.attn.norm"))
    n.save("mlp norm", n.add("model.norm", x=h, site="layers.0.mlp.norm"))
    normed = n.add("model.norm", x=h)
    n.save("lens", n.add("model.unembed", x=normed))
    n.save("embedded", n.add("model.embed", ids=[3, 250]))
    n.save("unembedded", n.add("model.unembed_rows", ids=[3, 250]))
    n.save("layer", n.add("model.module", module="layers.1", x=h))
    n.save("matmul by name", n.add("model.module", module="model.layers.1.mlp.up_proj", x=h))
    n.save("weight", n.add("weight.read", name="model.layers.0.mlp.up_proj.weight", index=[[0, 3]]))
    n.save("stats", n.add("weight.read", name="lm_head.weight", stats=True))
    for reduce in ("mean", "sum", "max", "last", "norm"):
        n.save(f"reduced {reduce}", h, reduce=reduce)
    program = program_of({"nodes": n}, {"nodes": n, "gen": {"max_tokens": 3}}, constants=constants)
    same(rig.run(program), rig.expect(program, constants))


@pytest.mark.parametrize("family", ["gpt2", "gemma2, capped scores and windows", "mixtral"])
def test_the_models_own_modules_equal_the_oracle(family, rig_of, program_of):
    rig = rig_of(family)
    n = Nodes()
    h = n.add("read", at="layers.0.out")
    n.save("lens", n.add("model.unembed", x=n.add("model.norm", x=h)))
    n.save("embedded", n.add("model.embed", ids=[3, 250]))
    n.save("unembedded", n.add("model.unembed_rows", ids=[3, 250]))
    n.save("layer", n.add("model.module", module="layers.1", x=h))
    program = program_of({"nodes": n})
    same(rig.run(program), rig.expect(program))


def test_the_lens_of_the_last_layer_is_the_logits(rig_of, program_of):
    for family in ("llama", "gemma2, capped scores and windows", "gpt2"):
        rig = rig_of(family)
        n = Nodes()
        h = n.add("read", at="layers.1.out")
        n.save("lens", n.add("model.unembed", x=n.add("model.norm", x=h)))
        n.save("logits", n.add("read", at="logits"))
        saves = rig.run(program_of({"nodes": n})).saves["r0"]
        assert torch.allclose(saves["lens"], saves["logits"], atol=1e-5)


def test_gates_that_latch_stay_open_over_steps(rig_of, program_of, constants):
    rig = rig_of()
    n = Nodes()
    v = n.add("const", name="v")
    h = n.add("read", at="layers.0.out")
    along = n.add("cosine", x=h, y=v)
    opened = n.add("gate", x=along, cmp="gt", threshold=0.02, latch=True)
    n.add("write", at="layers.0.out", x=v, mode="add", gate=opened)
    n.save("open", opened)
    n.save("along", along)
    n.save("x", n.add("read", at="logits"))
    program = program_of({"nodes": n, "gen": {"max_tokens": 8}}, constants=constants)
    outcome, expected = rig.run(program), rig.expect(program, constants)
    same(outcome, expected)
    opened = outcome.saves["r0"]["open"]
    assert opened.tolist() == sorted(opened.tolist())
    assert 0.0 < float(opened.mean()) < 1.0


def test_runs_take_what_others_saved(rig_of, program_of, constants):
    rig = rig_of()
    clean, mean, corrupt = Nodes(), Nodes(), Nodes()
    clean.save("h", clean.add("read", at="layers.0.out"))
    clean.save("gen", clean.add("read", at="layers.1.out", sel=LAST))
    mean.save("h", mean.add("saved", run="clean", save="h", mean=True))
    mean.save("own", mean.add("read", at="embed.out"))
    patch = corrupt.add("saved", run="clean", save="h", positions=[2, -1])
    ablated = corrupt.add("saved", run="mean", save="h")
    corrupt.add("write", at="layers.0.out", x=patch, sel={"pos": [2, -1]})
    corrupt.add("write", at="layers.1.mid", x=ablated, sel={"pos": [3]})
    corrupt.save("logits", corrupt.add("read", at="logits"))
    program = program_of(
        {"id": "corrupt", "nodes": corrupt, "ids": [9, 8, 7, 6, 5, 4, 3]},
        {"id": "mean", "nodes": mean},
        {"id": "clean", "nodes": clean, "gen": {"max_tokens": 4}},
    )
    same(rig.run(program), rig.expect(program))


def test_a_run_draws_the_tokens_of_a_plain_request_with_its_seed(rig_of, program_of, heard):
    rig = rig_of()
    how = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    program = program_of({"gen": how}, {"gen": {**how, "seed": 12}})
    request = Request(
        model="tiny",
        input=TokensInput(ids=(5, 6, 7, 8, 9, 10, 11)),
        sampling=Sampling(**how, ignore_eos=True),
    )
    plain = heard()
    digest = rig.engine.info.digest
    rig.engine.submit(
        Task(id=request.id, attempt=1, request=request, digest=digest, deadline_s=60.0), plain
    )
    outcome = rig.run(program)
    assert outcome.tokens[0] == plain.wait().ids()
    assert outcome.tokens[0] != outcome.tokens[1]
    assert outcome.end.finish_reasons == ("length", "length")
    assert outcome.end.usage.output_tokens == 24


def test_sampled_runs_equal_the_oracle(rig_of, program_of):
    rig = rig_of()
    how = [(0.3, 0), (1.0, 11), (1.0, 2**63 - 1), (2.0, 12)]
    runs = [{"gen": {"temperature": t, "seed": s, "max_tokens": 24}} for t, s in how]
    program = program_of(*runs)
    outcome, expected = rig.run(program), rig.expect(program)
    assert [outcome.tokens[i] for i in range(4)] == [expected[f"r{i}"].tokens for i in range(4)]
    assert len({tuple(tokens) for tokens in outcome.tokens.values()}) == 4


def test_a_written_sample_is_the_token_that_follows(rig_of, program_of):
    rig = rig_of()
    n = Nodes()
    n.save("in", n.add("read", at="layers.0.in"))
    forced = n.add("cast", x=n.add("zeros", shape=[1], fill=42.0), dtype="int64")
    n.add("write", at="sample", x=forced, sel={"steps": [1, 3]})
    n.save("sample", n.add("read", at="sample"))
    program = program_of({"nodes": n, "gen": {"max_tokens": 5}})
    outcome, expected = rig.run(program), rig.expect(program)
    same(outcome, expected)
    assert outcome.tokens[0] == expected["r0"].tokens
    assert outcome.tokens[0][1:3] == [42, 42]
    assert outcome.saves["r0"]["sample"].tolist() == outcome.tokens[0]


def test_streamed_saves_come_step_by_step_and_not_again(rig_of, program_of):
    rig = rig_of()
    n = Nodes()
    n.save("kept", n.add("read", at="layers.0.out", sel=LAST))
    h = n.add("read", at="layers.1.attn.pattern", sel={"phase": "decode"})
    n.save("live", h, stream=True)
    program = program_of({"nodes": n, "gen": {"max_tokens": 4}})
    outcome, expected = rig.run(program), rig.expect(program)["r0"]
    assert list(outcome.saves["r0"]) == ["kept"]
    assert [step for _, step in outcome.streamed] == [1, 2, 3]
    for step, value in expected.streamed["live"]:
        live = outcome.streamed["r0", step]["live"]
        assert live.shape == value.shape
        assert torch.allclose(live, value, atol=1e-5)


def test_spans_are_the_tokens_that_cover_a_text(rig_of, program_of):
    rig = rig_of()
    text = "the cat and the dog"
    n = Nodes()
    h = n.add("read", at="embed.out", sel={"pos": {"span": "the", "occurrence": 1}})
    n.save("second", h)
    by_text = program_of({"nodes": n, "ids": None, "text": text})
    outcome = rig.run(by_text)
    assert outcome.positions["r0"]["second"] == [12, 13, 14]
    by_ids = program_of({"nodes": n, "ids": list(_bytes(rig, text))})
    assert torch.equal(rig.run(by_ids).saves["r0"]["second"], outcome.saves["r0"]["second"])


def _bytes(rig, text):
    from transformers import PreTrainedTokenizerFast

    path = rig.engine._source.resolve()
    return PreTrainedTokenizerFast.from_pretrained(path)(text)["input_ids"]
