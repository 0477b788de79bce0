"""Random valid programs give on the engine what the oracle gives; broken ones end typed."""

from __future__ import annotations

import base64
import copy
import hashlib

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save

from fabric.messages import Program
from fabric.messages.program import Constants
from fabric.testing.program_strategies import Drawn, broken_programs, valid_programs
from fabric.testing.programs import Interpreter

AT_LEISURE = settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip


def with_constants(program: Program, drawn: Drawn) -> Program:
    if not drawn.constants:
        return program
    packed = save({name: x.contiguous() for name, x in drawn.constants.items()})
    consts = Constants(
        sha256=hashlib.sha256(packed).hexdigest(),
        size=len(packed),
        data=base64.b64encode(packed).decode(),
    )
    return program.model_copy(update={"consts": consts})


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not expected.dtype.is_floating_point or not expected.numel():
        return torch.equal(found, expected)
    found, expected = found.float(), expected.float()
    rough = expected.dtype != torch.float32
    scale = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 1.0
    return torch.allclose(found, expected, rtol=1e-3, atol=(2e-2 if rough else 2e-4) * (1 + scale),
                          equal_nan=True)  # fmt: skip


def clear(logits: torch.Tensor) -> bool:
    """Whether rounding cannot decide which token is the likeliest."""
    first, second = logits.topk(2).values.tolist()
    return first - second > 1e-3 * (1 + abs(first))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2, capped scores and windows"])
def test_random_programs_give_what_the_oracle_gives(family, rig_of):
    rig = rig_of(family)
    oracle = Interpreter(copy.deepcopy(rig.model))

    @AT_LEISURE
    @given(st.data())
    def hold(data):
        drawn = data.draw(valid_programs(rig.manifest))
        expected = oracle.run(drawn.program, drawn.constants)
        outcome = rig.run(with_constants(drawn.program, drawn))
        if outcome.end.type == "failed":
            failure = outcome.end.failure
            # What ``check`` refuses is tested with it; here it is what runs that counts.
            assert "not finite" in failure.message or failure.code == "program_invalid", failure
            assume(False)
        assume(all(clear(logits) for run in expected.values() for logits in run.logits))
        for i, run in enumerate(drawn.program.runs):
            assert outcome.tokens.get(i, []) == expected[run.id].tokens
            saves = outcome.saves.get(run.id, {})
            assert saves.keys() == expected[run.id].saves.keys()
            for name, value in expected[run.id].saves.items():
                assert equal(saves[name], value), name
            assert outcome.positions.get(run.id, {}) == expected[run.id].positions
            for name, steps in expected[run.id].streamed.items():
                for step, value in steps:
                    assert equal(outcome.streamed[run.id, step][name], value), (name, step)

    hold()


def test_broken_programs_never_harm_the_engine(rig_of, program_of):
    rig = rig_of()
    sound = program_of({"nodes": [{"op": "read", "at": "logits"},
                                  {"op": "save", "name": "x", "x": 0}]})  # fmt: skip
    expected = rig.run(sound).saves["r0"]["x"]

    @AT_LEISURE
    @given(st.data())
    def hold(data):
        broken, drawn = data.draw(broken_programs(rig.manifest))
        try:
            program = with_constants(Program.model_validate(broken), drawn)
        except ValidationError:
            return  # the wire refused it
        end = rig.run(program).end
        assert end.type == "finished" or end.failure.code != "engine_error", end

    hold()
    assert torch.equal(rig.run(sound).saves["r0"]["x"], expected)
