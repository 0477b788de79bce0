"""Random programs: what is checked runs as it was inferred; what is broken is refused, typed."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fabric.errors import ProgramError
from fabric.messages import nodes as n
from fabric.messages.program import Program
from fabric.programs import Checked, TensorSpec, check
from fabric.testing.program_strategies import Drawn, broken_programs, valid_programs
from fabric.testing.programs import RunOutcome
from fabric.testing.tiny_models import FAMILIES, Tiny, tiny_model

TINIES = {family: tiny_model(family) for family in FAMILIES}
AT_LEISURE = settings(
    deadline=None,
    derandomize=True,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def specs_of(drawn: Drawn) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for name, x in drawn.constants.items()
    }


def held_to_what_was_inferred(checked: Checked, outcomes: dict[str, RunOutcome]) -> None:
    for run in checked.runs:
        outcome = outcomes[run.run.id]
        num_bytes = 0
        for node, inferred in zip(run.run.nodes, run.nodes, strict=True):
            if isinstance(node, n.Save) and not node.stream:
                x = outcome.saves[node.name]
                assert len(x.shape) == len(inferred.shape), node
                for size, axis in zip(x.shape, inferred.shape, strict=True):
                    # An axis has a name where the end-of-sequence token may end the run early.
                    assert size == axis or (isinstance(axis, str) and not run.run.gen.ignore_eos)
                assert str(x.dtype) == f"torch.{inferred.dtype}", node
                assert (node.name in outcome.positions) == inferred.positions, node
                num_bytes += x.numel() * x.element_size()
        assert num_bytes <= run.result_bytes


@AT_LEISURE
@given(st.sampled_from(sorted(TINIES)), st.data())
def test_valid_programs_pass_and_run_in_the_shapes_inferred(
    family: str, data: st.DataObject
) -> None:
    tiny: Tiny = TINIES[family]
    drawn = data.draw(valid_programs(tiny.manifest))
    checked = check(drawn.program, tiny.manifest, specs_of(drawn))
    held_to_what_was_inferred(checked, tiny.oracle.run(drawn.program, drawn.constants))


@settings(AT_LEISURE, max_examples=150)
@given(st.sampled_from(sorted(TINIES)), st.data())
def test_broken_programs_are_refused_with_a_type_or_can_be_run(
    family: str, data: st.DataObject
) -> None:
    tiny: Tiny = TINIES[family]
    broken, drawn = data.draw(broken_programs(tiny.manifest))
    try:
        program = Program.model_validate(broken)
        checked = check(program, tiny.manifest, specs_of(drawn))
    except (ValidationError, ProgramError):
        return
    assume(all(run.text is None for run in program.runs))
    with torch.no_grad():
        outcomes = tiny.oracle.run(program, drawn.constants)
    held_to_what_was_inferred(checked, outcomes)


@AT_LEISURE
@given(st.sampled_from(sorted(TINIES)), st.integers(0, 9), st.data())
def test_a_text_is_not_refused_for_what_its_tokens_may_be(
    family: str, more: int, data: st.DataObject
) -> None:
    """The hub knows no tokens: it must let through what the engine can run, and bound it."""
    manifest = TINIES[family].manifest
    drawn = data.draw(valid_programs(manifest))
    # The positions of one token are one in every step, which no bound says.
    assume(all(len(run.ids or ()) > 1 for run in drawn.program.runs))
    runs = tuple(
        run.model_copy(update={"ids": None, "text": "a" * (len(run.ids or ()) - 1 + more)})
        for run in drawn.program.runs
    )
    exact = check(drawn.program, manifest, specs_of(drawn))
    bound = check(drawn.program.model_copy(update={"runs": runs}), manifest, specs_of(drawn))
    assert bound.num_flops >= exact.num_flops
    assert bound.result_bytes >= exact.result_bytes
    assert (bound.scopes, bound.lane) == (exact.scopes, exact.lane)
    for run, same in zip(bound.runs, exact.runs, strict=True):
        assert run.affects_prefill or not same.affects_prefill
        assert (run.earliest_read is None) <= (same.earliest_read is None)
