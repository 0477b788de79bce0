"""Speculative decoding: rows run guessed tokens too, and keep those they would have chosen.

Each position makes the draw that it would make without speculation (``sampling.py``), and a guess
is kept if it is what the draw gives. So the tokens are those of a run without speculation, greedy
or sampled, and not only their distribution.

Shapes: J guesses that a step might run, most promising first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fabric.engine.costs import StepCosts
from fabric.engine.drafts import Drafter
from fabric.engine.rows import FIRST_ACCEPTANCE, Row
from fabric.engine.scheduler import Run, Scheduler

_DEEPEST = 15
"""The most guesses of one row in a step."""

_LEARNING = 0.15
"""What one guess counts in a row's acceptance."""

_FORGETTING = 0.005
"""How fast a row that is not guessed for comes back to where it began: it is tried again."""

_LEAST_GAIN = 1.03
"""How much faster a step must become before anything is guessed: predictions are not exact."""


class Speculator:
    """Decides how many tokens to guess for whom, and learns from what became of them.

    Args:
        drafter: Makes the guesses.
        scheduler: Has the blocks for their keys.
        costs: Of the model's steps.
    """

    def __init__(self, drafter: Drafter, scheduler: Scheduler, costs: StepCosts) -> None:
        self._drafter = drafter
        self._scheduler = scheduler
        self._costs = costs
        self.num_drafted = 0
        """Guesses that were run, since the start."""
        self.num_accepted = 0
        """Guesses of them that became tokens."""

    def extend(self, runs: Sequence[Run]) -> list[Run]:
        """Return the step with guesses where they pay; short runs stay first."""
        rows = [run.row for run in runs if run.num_wanted and run.row.decodes]
        offers = {}
        for row in rows:
            if row.active.program is not None:
                continue  # its nodes act step by step
            num_offered = self._drafter.offers(row, min(_DEEPEST, row.num_left - 1))
            if num_offered > 0 and not row.spoilt:
                offers[row] = num_offered
        depths = self._depths(offers, len(rows), sum(run.num_tokens for run in runs))
        for row in offers:
            if row not in depths:
                row.acceptance += _FORGETTING * (FIRST_ACCEPTANCE - row.acceptance)
        lent = {row: self._scheduler.lend(row, depth) for row, depth in depths.items()}
        drafts = self._drafter.draft({row: depth for row, depth in lent.items() if depth})
        extended = [_extend(run, drafts.get(run.row, ())) for run in runs]
        return sorted(extended, key=lambda run: run.num_tokens)

    def learn(self, run: Run, num_accepted: int) -> None:
        """Take note of a run with guesses: so many were kept."""
        row, num_drafted = run.row, len(run.draft)
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        for kept in [1.0] * num_accepted + [0.0] * (num_drafted > num_accepted):
            row.acceptance += _LEARNING * (kept - row.acceptance)
        # Keys after the last guess that was kept are of tokens that are not the row's.
        row.num_drafted = min(row.num_drafted, row.num_cached)

    def _depths(self, offers: Mapping[Row, int], num_rows: int, num_tokens: int) -> dict[Row, int]:
        """Return how many guesses of each row make the step's tokens come fastest."""
        guesses = [(row.acceptance**i, i, row) for row in offers for i in range(1, offers[row] + 1)]
        if not guesses:
            return {}
        guesses.sort(key=lambda guess: -guess[0])
        gain_J = np.cumsum([gain for gain, *_ in guesses])
        deepest_J = np.maximum.accumulate([depth for _, depth, _ in guesses])
        sizes = num_tokens + np.arange(len(guesses) + 1)
        step_s = self._costs.predict_all(sizes)
        draft_s = deepest_J * self._drafter.cost_s(len(offers))
        rate_J = (num_rows + gain_J) / (step_s[1:] + draft_s)
        best = int(rate_J.argmax())
        if rate_J[best] * step_s[0] <= _LEAST_GAIN * num_rows:
            return {}
        depths: dict[Row, int] = {}
        for _, depth, row in guesses[: best + 1]:
            depths[row] = depth
        return depths


def _extend(run: Run, draft: Sequence[int]) -> Run:
    if not draft:
        return run
    num = 1 + len(draft)
    return replace(run, num_tokens=num, num_wanted=num, draft=tuple(draft))
