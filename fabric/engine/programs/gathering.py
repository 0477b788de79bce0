"""Gathers the programs among the rows of a step, each with what it has to do there.

Shapes: S keys of one run, K key-value heads, D head size, M cache blocks' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.programs.composition import Composition
from fabric.engine.programs.steady import Steady
from fabric.engine.programs.step import ProgramStep, RunStep
from fabric.engine.runner import Runner

if TYPE_CHECKING:
    from fabric.engine.programs.task import RunProgram
    from fabric.engine.rows import Row
    from fabric.engine.scheduler import Run


class Gathering:
    """Finds the programs of an engine's steps.

    Args:
        runner: The model over its cache.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._composition = Composition({})

    def programs_of(self, runs: Sequence[Run]) -> ProgramStep | None:
        """Return the programs of a step, begun; ``None`` if there are none."""
        found: list[RunStep] = []
        steady: dict[int, Row] = {}
        composed: dict[int, Steady] = {}
        begin = wanted = 0
        for run in runs:
            row, program = run.row, run.row.active.program
            if program is not None and program.acts:
                alike = program.execution.steady
                if alike is not None and run.num_tokens == 1 and row.decodes:
                    steady[begin], composed[begin] = row, alike
                else:
                    found.append(_run_step(run, program, begin, wanted))
            begin, wanted = begin + run.num_tokens, wanted + run.num_wanted
        if composed != self._composition.runs:
            self._composition = Composition(composed)
        if not found and not steady:
            return None
        assert self._runner.points is not None
        step = ProgramStep(
            found,
            self._runner.points,
            self._keys,
            alone=len(found) == len(runs),
            steady=steady,
            composition=self._composition,
        )
        with torch.inference_mode() if found else nullcontext():
            step.begin()
        return step

    def _keys(self, layer: int, run: RunStep) -> tuple[Tensor, Tensor]:
        """Return a run's keys and values, [S, K, D] each."""
        assert run.row is not None
        num_keys = run.start + run.count
        blocks = torch.tensor([run.row.blocks[: -(-num_keys // BLOCK_TOKENS)]])
        k_1MKD, v_1MKD = self._runner.cache.read(layer, blocks)
        return k_1MKD[0, :num_keys], v_1MKD[0, :num_keys]


def _run_step(run: Run, program: RunProgram, begin: int, wanted: int) -> RunStep:
    return RunStep(
        execution=program.execution,
        model=program.model,
        begin=begin,
        count=run.num_tokens,
        start=run.row.num_cached,
        wanted=(wanted, run.num_wanted),
        row=run.row,
    )
