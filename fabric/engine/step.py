"""What one step computes: logits of the due rows, the prompt's scores, the next tokens.

Shapes: N tokens, H hidden size, W positions whose logits are wanted, R rows that get a token,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fabric.engine.adjustments import Adjustment, adjust, changes_logits
from fabric.engine.rows import ActiveTask, Row
from fabric.engine.runner import Chunk, Runner
from fabric.engine.sampling import Draw, Score, choose, finite_rows, score
from fabric.engine.scheduler import Run, Scheduler
from fabric.errors import ConstraintFailed, FabricError, RowFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The next token of one row; ``score`` if log probabilities were asked for."""

    row: Row
    token_id: int
    score: Score | None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a step gave, by task. Those in ``failed`` get no token and end."""

    chosen: dict[ActiveTask, list[Chosen]] = field(default_factory=dict)
    failed: dict[ActiveTask, FabricError] = field(default_factory=dict)


def run_step(runs: Sequence[Run], runner: Runner, scheduler: Scheduler) -> Outcome:
    """Run the model over ``runs``, advance their rows' caches and choose tokens.

    Tokens are chosen, not yet appended to the rows.
    """
    chunks = [
        Chunk(
            tokens=run.row.tokens[run.row.num_cached : run.row.num_cached + run.num_tokens],
            start=run.row.num_cached,
            blocks=run.row.blocks,
            num_wanted=run.num_wanted,
            deltas=run.row.active.deltas,
        )
        for run in runs
    ]
    if any(run.row.active.embeds for run in runs):
        logits_WV, hidden_NH = runner.forward_hidden(chunks)
        _gather(runs, hidden_NH)
    else:
        logits_WV = runner.forward(chunks)
    finite = finite_rows(logits_WV)
    outcome = Outcome()
    due: list[tuple[Row, int]] = []
    end = 0
    for run in runs:
        begin, end = end, end + run.num_wanted
        if not all(finite[begin:end]):
            reason = "the model's output for it is not finite"
            outcome.failed[run.row.active] = RowFailed(reason=reason)
            continue
        _score_prompt(run, logits_WV[begin:end])
        run.row.num_cached += run.num_tokens
        if run.num_wanted:
            scheduler.keep(run.row)
        if run.row.num_remaining == 0:
            due += [(row, end - 1) for row in _next_rows(run.row, runner, scheduler)]
    _choose_all(due, logits_WV, outcome)
    return outcome


def _next_rows(row: Row, runner: Runner, scheduler: Scheduler) -> list[Row]:
    """Return the rows whose next token follows from this one's logits."""
    active = row.active
    if active.max_tokens == 0:
        return []
    if active.forked:
        return [row]
    for source, target in scheduler.fork(active):
        runner.cache.copy_block(source, target)
    return active.rows


def _choose_all(due: Sequence[tuple[Row, int]], logits_WV: Tensor, outcome: Outcome) -> None:
    """Choose the next token of each row; one whose constraint leaves none fails its task."""
    allowed: dict[Row, NDArray[np.bool_]] = {}
    for row, _ in due:
        if row.matcher is not None:
            try:
                allowed[row] = row.matcher.allowed(logits_WV.shape[1])
            except ConstraintFailed as error:
                outcome.failed[row.active] = error
    due = [(row, index) for row, index in due if row.active not in outcome.failed]
    if not due:
        return
    logits_RV = logits_WV[torch.tensor([index for _, index in due])]
    adjustments = {
        i: _adjustment(row, allowed.get(row))
        for i, (row, _) in enumerate(due)
        if row in allowed or changes_logits(row.active.sampling)
    }
    adjusted_RV = adjust(logits_RV, adjustments)
    possible = finite_rows(adjusted_RV) if adjustments else [True] * len(due)
    if not all(possible):
        adjusted_RV = torch.where(torch.tensor(possible)[:, None], adjusted_RV, logits_RV)
    tokens = choose(adjusted_RV, [_draw(row) for row, _ in due])
    scores = _score_chosen([row for row, _ in due], tokens, logits_RV)
    for i, (row, _) in enumerate(due):
        if not possible[i]:
            reason = "the model gives no probability to any token that may follow"
            outcome.failed[row.active] = ConstraintFailed(reason=reason)
            continue
        chosen = Chosen(row=row, token_id=tokens[i], score=_cut(scores.get(i), row))
        outcome.chosen.setdefault(row.active, []).append(chosen)


def _adjustment(row: Row, allowed: NDArray[np.bool_] | None) -> Adjustment:
    active = row.active
    return Adjustment(
        sampling=active.sampling,
        prompt=active.prompt,
        generated=row.tokens[len(active.prompt) :],
        allowed=allowed,
    )


def _score_chosen(
    rows: Sequence[Row], tokens: Sequence[int], logits_RV: Tensor
) -> dict[int, Score]:
    """Return the scores that were asked for: the model's own, before anything was adjusted."""
    scored = [i for i, row in enumerate(rows) if row.active.sampling.logprobs is not None]
    if not scored:
        return {}
    most = max(rows[i].active.sampling.logprobs or 0 for i in scored)
    of_scored = score(logits_RV[scored], [tokens[i] for i in scored], most)
    return dict(zip(scored, of_scored, strict=True))


def _draw(row: Row) -> Draw:
    active = row.active
    return Draw.of(active.sampling, seed=active.seed, choice=row.choice, position=row.position)


def _score_prompt(run: Run, logits_WV: Tensor) -> None:
    active, start = run.row.active, run.row.num_cached
    if not active.scores_due or start >= len(active.prompt):
        return
    if start == 0:
        active.scores.append(None)
    following = active.prompt[start + 1 : start + 1 + run.num_tokens]
    if following:
        num_top = active.sampling.logprobs or 0
        active.scores += score(logits_WV[: len(following)], following, num_top)


def _gather(runs: Sequence[Run], hidden_NH: Tensor) -> None:
    """Add the step's hidden states to the prompts that become vectors."""
    end = 0
    for run in runs:
        begin, end = end, end + run.num_tokens
        active = run.row.active
        if not active.embeds:
            continue
        if active.task.request.pooling == "last":
            active.hidden_H = hidden_NH[end - 1]
        else:
            sum_H = hidden_NH[begin:end].sum(0)
            active.hidden_H = sum_H if active.hidden_H is None else active.hidden_H + sum_H


def _cut(of_token: Score | None, row: Row) -> Score | None:
    """Return the score with as many alternatives as its own request wants."""
    if of_token is None:
        return None
    return Score(logprob=of_token.logprob, top=of_token.top[: row.active.sampling.logprobs])
