"""Runs with gradients: a forward pass of their own, never in the shared batch.

The model's plain copy runs over the whole prompt, without a cache, and remembers what gradients
need. Nothing is generated there.

Shapes: N tokens, H query heads, K key-value heads, D head size, W wanted logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from fabric.engine.attention import Chunk, Scoring, attend_causally
from fabric.engine.programs.execution import Execution
from fabric.engine.programs.model import RunModel, Weights, swapped
from fabric.engine.programs.points import Points
from fabric.engine.programs.step import ProgramStep, RunStep, Stopped
from fabric.engine.runner import run_ragged, use_our_attention
from fabric.errors import ProgramFailed


class GradientLane:
    """Runs one run at a time.

    Args:
        weights: Of the model; the plain copy is made when a run first needs it.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._points: Points | None = None

    def model(self) -> Points:
        """Return the points of the plain model."""
        if self._points is None:
            use_our_attention(self._weights.plain)
            self._points = Points(self._weights.plain)
            self._points.find()
        return self._points

    def run(self, execution: Execution, model: RunModel, *, seconds: float) -> None:
        """Run a prompt and its nodes.

        Args:
            execution: The run's state; its saves are there afterwards.
            model: Over the plain model.
            seconds: The most that it may take; looked at whenever the model comes by a point.

        Raises:
            ProgramError: A node failed, or the time is over.
        """
        ids = execution.run.ids or ()
        num_wanted = execution.num_wanted(0, len(ids))
        run = RunStep(
            execution=execution,
            model=model,
            begin=0,
            count=len(ids),
            start=0,
            wanted=(0, num_wanted),
            until=time.perf_counter() + seconds,
            limit_s=seconds,
        )
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(
            layer: int,
            q_NHD: Tensor,
            k_NKD: Tensor,
            v_NKD: Tensor,
            scale: float | None,
            options: Mapping[str, object],
        ) -> Tensor:
            kept[layer] = k_NKD, v_NKD
            return attend_causally(q_NHD, k_NKD, v_NKD, Scoring.of(scale, options, q_NHD.shape[2]))

        points = self.model()
        step = ProgramStep([run], points, lambda layer, _: kept[layer], alone=True)
        chunk = Chunk(tokens=ids, start=0, blocks=(), num_wanted=num_wanted)
        with torch.enable_grad(), swapped(model.private):
            step.begin()
            try:
                with step.hooked():
                    logits_WV = run_ragged(
                        self._weights.plain, [chunk], step.around(attend), grad=True
                    )
            except Stopped:
                pass
            else:
                step.logits(logits_WV)
                if not bool(logits_WV.isfinite().all()):
                    reason = "the model's output for it is not finite"
                    run.error = run.error or ProgramFailed(run=execution.run.id, reason=reason)
            step.end()
        if run.error is not None:
            raise run.error
