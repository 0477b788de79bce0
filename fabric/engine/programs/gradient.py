"""Runs with gradients: a forward pass of their own, never in the shared batch.

The model's plain copy runs over the whole prompt, without a cache, and remembers what gradients
need. Nothing is generated there. The pass goes in slices between the batch's steps, forward and
backward: it may pause wherever it comes by a layer, its attention or its MLP.

Shapes: N tokens, H query heads, K key-value heads, D head size, W wanted logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fabric.engine.attention import Chunk, Scoring, attend_causally
from fabric.engine.programs.aside import Aside
from fabric.engine.programs.execution import Execution
from fabric.engine.programs.model import Exchange, RunModel, Weights, nested
from fabric.engine.programs.points import Points
from fabric.engine.programs.step import ProgramStep, RunStep, Stopped
from fabric.engine.runner import run_ragged, use_our_attention
from fabric.errors import ProgramFailed

Make = Callable[[Points], tuple[Execution, RunModel]]
"""Makes a run ready, over the plain model's points."""


class GradientLane:
    """Runs one run at a time.

    Args:
        weights: Of the model; the plain copy is made when a run first needs it.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._points: Points | None = None

    def begin(self, make: Make) -> Aside:
        """Return a run as work beside the steps; its saves are in its execution afterwards.

        What ends it is a ``ProgramError`` of a node, or of the model's output.
        """
        return Aside(partial(self._work, make))

    def _work(self, make: Make, aside: Aside) -> None:
        _ = self._weights.plain  # read beside the steps, which have no use for it
        aside.pause()
        execution, model = make(self._find())
        self._run(execution, model, aside)

    def _find(self) -> Points:
        """Return the points of the plain model."""
        if self._points is None:
            use_our_attention(self._weights.plain)
            self._points = Points(self._weights.plain)
            self._points.find()
        return self._points

    def _run(self, execution: Execution, model: RunModel, aside: Aside) -> None:
        """Run a prompt and its nodes."""
        ids = execution.run.ids or ()
        num_wanted = execution.num_wanted(0, len(ids))
        run = RunStep(
            execution=execution,
            model=model,
            begin=0,
            count=len(ids),
            start=0,
            wanted=(0, num_wanted),
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

        points = self._find()
        step = ProgramStep([run], points, lambda layer, _: kept[layer], alone=True)
        chunk = Chunk(tokens=ids, start=0, blocks=(), num_wanted=num_wanted)
        own = Exchange(model.private)

        def pause() -> None:
            # Steps may read the plain model's weights: they shall not find this run's own.
            with own:
                aside.pause()

        with torch.enable_grad(), own, _pausing(points, aside, pause):
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


@contextmanager
def _pausing(points: Points, aside: Aside, pause: Callable[[], None]) -> Iterator[None]:
    """Pause inside where a slice is over: before modules, and where gradients come back to them."""

    def before(*_: object) -> None:
        if aside.due and not nested():
            pause()

    def after(_: nn.Module, __: object, output: object) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.requires_grad and not nested():
            x.register_hook(before)

    anatomy = points.anatomy
    parts = () if anatomy is None else anatomy.layers
    inside = [module for part in parts for module in (part.layer, part.attention, part.mlp)]
    modules = [module for module in inside if module is not None]
    modules += [] if anatomy is None else [anatomy.head]
    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
