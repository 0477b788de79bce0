"""Gathers the programs among the rows of a step, each with what it has to do there.

Shapes: S keys of one run, K key-value heads, D head size, M cache blocks' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.programs.points import Points
from fabric.engine.programs.steady import Steady
from fabric.engine.programs.step import ProgramStep, RunStep
from fabric.engine.runner import Runner

if TYPE_CHECKING:
    from fabric.engine.programs.task import RunProgram
    from fabric.engine.scheduler import Run


def programs_of(runs: Sequence[Run], runner: Runner) -> ProgramStep | None:
    """Return the programs of a step, begun; ``None`` if there are none."""
    found: list[RunStep] = []
    adds: dict[str, dict[int, Tensor]] = {}
    begin = wanted = 0
    for run in runs:
        program = run.row.active.program
        steady = None
        if program is not None and run.num_tokens == 1 and run.row.decodes:
            steady = _steady(program, runner.points)
        if steady is not None:
            for point, vector in steady.adds.items():
                adds.setdefault(point, {})[begin] = vector
        if program is not None and (program.acts if steady is None else steady.saves):
            found.append(
                RunStep(
                    execution=program.execution,
                    model=program.model,
                    begin=begin,
                    count=run.num_tokens,
                    start=run.row.num_cached,
                    wanted=(wanted, run.num_wanted),
                    row=run.row,
                    saving=() if steady is None else steady.saves,
                )
            )
        begin, wanted = begin + run.num_tokens, wanted + run.num_wanted
    if not found and not adds:
        return None
    assert runner.points is not None

    def keys(layer: int, run: RunStep) -> tuple[Tensor, Tensor]:
        assert run.row is not None
        num_keys = run.start + run.count
        blocks = torch.tensor([run.row.blocks[: -(-num_keys // BLOCK_TOKENS)]])
        k_1MKD, v_1MKD = runner.cache.read(layer, blocks)
        return k_1MKD[0, :num_keys], v_1MKD[0, :num_keys]

    step = ProgramStep(found, runner.points, keys, alone=len(found) == len(runs), adds=adds)
    with torch.inference_mode():
        step.begin()
    return step


def _steady(program: RunProgram, points: Points | None) -> Steady | None:
    """Return what a run does in every step of decoding, if modules' hooks alone can do it."""
    steady = program.execution.steady
    if steady is None or points is None or program.model.private:
        return None
    taps = [points.taps[point] for point in steady.saves]
    within = all(tap.module is not None and tap.route is None for tap in taps)
    whole = not any(point.endswith(".head_out") for point in steady.saves)
    return steady if within and whole else None
