"""Programs beside other rows: who shares what, who changes whom, what is computed again."""

from __future__ import annotations

import threading

import pytest
import torch

from fabric.messages import Request, Sampling, Task, TokensInput

LONG = [(7 * i) % 250 for i in range(60)]
STEER = [
    {"op": "const", "name": "v"},
    {"op": "write", "at": "layers.0.out", "x": 0, "mode": "add", "alpha": 6.0},
]


@pytest.fixture(scope="module")
def vector():
    torch.manual_seed(2)
    return {"v": torch.randn(48)}


def ask(rig, heard, ids, *, salt="", **sampling):
    """A plain request beside the programs."""
    how = Sampling.model_validate(
        {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling
    )
    request = Request(model="tiny", input=TokensInput(ids=tuple(ids)), sampling=how)
    task = Task(id=request.id, attempt=1, request=request, digest=rig.engine.info.digest,
                deadline_s=120.0, cache_salt=salt)  # fmt: skip
    sink = heard()
    rig.engine.submit(task, sink)
    return sink


def generate(nodes, *, name="r", num=8, save="logits", **run):
    nodes = [*nodes, {"op": "read", "at": save, "sel": {"pos": "last"}}]
    nodes = [*nodes, {"op": "save", "name": "x", "x": len(nodes) - 1}]
    return {"id": name, "nodes": nodes, "gen": {"max_tokens": num}, **run}


def test_unhooked_rows_keep_their_bits_beside_hooked_ones(rig_of, program_of, heard, vector):
    # Wide steps: how a prompt is divided must not depend on the time that steps took.
    rig = rig_of(fresh="bits", step_tokens=400, slowdown=1e6)
    prompts = [LONG[i : i + 5 + i] for i in range(4)]
    together = threading.Event()

    def scores(num_programs):
        """Fill the batch from inside the engine's thread, so that both times it is the same."""
        sinks = []
        changed = [generate(STEER, name=f"p{i}", ids=LONG[: 3 + i]) for i in range(num_programs)]
        plain = [generate([], name=f"p{i}", ids=LONG[: 3 + i]) for i in range(num_programs)]

        def fill(event):
            if not sinks and event.type == "token":
                sinks.extend(ask(rig, heard, ids, logprobs=5) for ids in prompts)

        runs = changed if together.is_set() else plain
        constants = vector if together.is_set() else None
        sink = rig.send(program_of(*runs, constants=constants), on_event=fill)
        assert sink.wait().events[-1].type == "finished"
        return [[(t.token_id, t.logprob, t.top_logprobs) for t in s.wait().tokens()] for s in sinks]

    plain = scores(3)
    together.set()
    assert scores(3) == plain


def test_a_steered_run_in_a_full_batch_gives_what_it_gives_alone(rig_of, program_of, vector):
    rig = rig_of()
    runs = [generate(STEER if i % 2 else [], name=f"r{i}", ids=LONG[i : i + 9]) for i in range(12)]
    program = program_of(*runs, constants=vector)
    outcome, expected = rig.run(program), rig.expect(program, vector)
    for i, run in enumerate(runs):
        assert outcome.tokens[i] == expected[run["id"]].tokens
        assert torch.allclose(
            outcome.saves[run["id"]]["x"], expected[run["id"]].saves["x"], atol=1e-4
        )


def test_a_prompt_longer_than_a_step_is_read_as_a_whole(rig_of, program_of, heard):
    rig = rig_of(fresh="chunks", step_tokens=17)
    other = ask(rig, heard, [1, 2], max_tokens=60)
    nodes = [{"op": "read", "at": "layers.1.attn.pattern"}, {"op": "save", "name": "all", "x": 0}]
    program = program_of(generate(nodes, ids=LONG, num=3))
    outcome, expected = rig.run(program), rig.expect(program)["r"]
    assert outcome.tokens[0] == expected.tokens
    for name in ("all", "x"):
        assert torch.allclose(outcome.saves["r"][name], expected.saves[name], atol=1e-4)
    assert len(other.wait().ids()) == 60


def test_preempted_runs_start_over_and_tell_nothing_twice(rig_of, program_of, vector, outcome):
    rig = rig_of(fresh="small", cache_bytes=2**18)
    reads = [
        *STEER,
        {"op": "read", "at": "layers.1.out", "sel": {"pos": "last"}},
        {"op": "save", "name": "h", "x": 2},
        {"op": "save", "name": "now", "x": 2, "stream": True},
    ]
    streams = [generate(reads, name=f"r{i}", ids=LONG[i : i + 20], num=120) for i in range(3)]
    steady = [
        {"id": f"r{i}", "nodes": reads[:-1], "ids": LONG[i : i + 20], "gen": {"max_tokens": 120}}
        for i in range(3, 6)
    ]
    runs = [*streams, *steady]
    program = program_of(*runs, constants=vector)
    before = rig.engine.load().num_preempted
    heard = rig.send(program)
    from_engine = heard.wait()
    assert from_engine.events[-1].type == "finished", from_engine.events[-1].failure.message
    assert rig.engine.load().num_preempted > before
    expected = rig.expect(program, vector)
    steps = [(e.run, e.step) for e in heard.events if e.type == "saves" and e.step is not None]
    assert sorted(steps) == [(f"r{i}", step) for i in range(3) for step in range(120)]
    saves = outcome(heard).saves
    for i in range(6):
        assert [t.position for t in heard.tokens(i)] == list(range(120))
        assert heard.ids(i) == expected[f"r{i}"].tokens
        assert torch.allclose(saves[f"r{i}"]["h"], expected[f"r{i}"].saves["h"], atol=1e-4)


class TestPrefixes:
    """What is cached under which name."""

    @pytest.fixture
    def rig(self, rig_of):
        return rig_of(fresh="prefixes")

    def found(self, sink):
        return sink.wait().events[-1].usage.cached_prompt_tokens

    def test_a_write_in_the_prompt_is_not_found_by_others(self, rig, program_of, heard, vector):
        steered = program_of(generate(STEER, ids=LONG), constants=vector)
        assert rig.run(steered, salt="a").end.type == "finished"
        plain = ask(rig, heard, LONG, salt="a")
        assert self.found(plain) == 0
        assert plain.ids() == rig.expect(program_of(generate([], ids=LONG)))["r"].tokens

    def test_a_decode_only_write_leaves_the_prompt_shared(self, rig, program_of, heard, vector):
        ask(rig, heard, LONG, salt="b").wait()
        late = [STEER[0], {**STEER[1], "sel": {"phase": "decode"}}]
        program = program_of(generate(late, ids=LONG, num=24), constants=vector)
        outcome, expected = rig.run(program, salt="b"), rig.expect(program, vector)["r"]
        assert outcome.end.usage.cached_prompt_tokens == 48
        assert outcome.tokens[0] == expected.tokens
        # What it generated is steered: nobody finds that as the continuation of the plain prompt.
        on = ask(rig, heard, LONG + expected.tokens, salt="b", max_tokens=4)
        assert self.found(on) == 48
        continued = program_of(generate([], ids=LONG + expected.tokens, num=4))
        assert on.ids() == rig.expect(continued)["r"].tokens

    def test_reads_are_computed_from_the_first_position_read(self, rig, program_of, heard):
        ask(rig, heard, LONG, salt="c").wait()
        for first, reused in ((40, 32), (0, 0), (59, 48)):
            sel = {"pos": list(range(first, 60))}
            nodes = [{"op": "read", "at": "layers.1.mid", "sel": sel},
                     {"op": "save", "name": "mid", "x": 0}]  # fmt: skip
            program = program_of({"id": "r", "nodes": nodes, "ids": LONG})
            outcome = rig.run(program, salt="c")
            assert outcome.end.usage.cached_prompt_tokens == reused
            expected = rig.expect(program)["r"].saves["mid"]
            assert torch.allclose(outcome.saves["r"]["mid"], expected, atol=1e-4)

    def test_a_patch_shares_what_lies_before_it(self, rig, program_of, vector):
        def patched(position):
            write = {**STEER[1], "mode": "set", "alpha": 1.0, "sel": {"pos": [position]}}
            return generate([STEER[0], write], name=f"p{position}", ids=LONG, num=2)

        first = program_of(generate([], ids=LONG, num=1))
        assert rig.run(first, salt="d").end.type == "finished"
        program = program_of(*[patched(p) for p in (5, 20, 50)], constants=vector)
        outcome, expected = rig.run(program, salt="d"), rig.expect(program, vector)
        assert outcome.end.usage.cached_prompt_tokens == 0 + 16 + 48
        for i, position in enumerate((5, 20, 50)):
            assert outcome.tokens[i] == expected[f"p{position}"].tokens
        again = rig.run(program, salt="d")
        assert again.tokens == outcome.tokens
        assert again.end.usage.cached_prompt_tokens == 3 * 48

    def test_tenants_share_nothing(self, rig, program_of):
        program = program_of(generate([], ids=LONG))
        rig.run(program, salt="e")
        assert rig.run(program, salt="e").end.usage.cached_prompt_tokens == 48
        assert rig.run(program, salt="f").end.usage.cached_prompt_tokens == 0
        assert rig.run(program).end.usage.cached_prompt_tokens == 0
        assert rig.run(program).end.usage.cached_prompt_tokens == 0
