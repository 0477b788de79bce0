"""What one step computes: logits of the due rows, the prompt's scores, the next tokens.

Shapes: N tokens, H hidden size, W positions whose logits are wanted, R rows that get a token,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fabric.engine.rows import ActiveTask, Row
from fabric.engine.runner import Chunk, Runner
from fabric.engine.sampling import Draw, Score, choose, finite_rows, score
from fabric.engine.scheduler import Run, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The next token of one row; ``score`` if log probabilities were asked for."""

    row: Row
    token_id: int
    score: Score | None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a step gave, by task. Tasks in ``failed`` have logits that are not finite."""

    chosen: dict[ActiveTask, list[Chosen]] = field(default_factory=dict)
    failed: list[ActiveTask] = field(default_factory=list)


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
            outcome.failed.append(run.row.active)
            continue
        _score_prompt(run, logits_WV[begin:end])
        run.row.num_cached += run.num_tokens
        if run.num_wanted:
            scheduler.keep(run.row)
        if run.row.num_remaining == 0:
            due += [(row, end - 1) for row in _next_rows(run.row, runner, scheduler)]
    failed = set(outcome.failed)
    due = [(row, index) for row, index in due if row.active not in failed]
    if due:
        for chosen in _choose(due, logits_WV):
            outcome.chosen.setdefault(chosen.row.active, []).append(chosen)
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


def _choose(due: Sequence[tuple[Row, int]], logits_WV: Tensor) -> list[Chosen]:
    logits_RV = logits_WV[torch.tensor([index for _, index in due])]
    tokens = choose(logits_RV, [_draw(row) for row, _ in due])
    scored = [i for i, (row, _) in enumerate(due) if row.active.sampling.logprobs is not None]
    scores: dict[int, Score] = {}
    if scored:
        most = max(due[i][0].active.sampling.logprobs or 0 for i in scored)
        of_scored = score(logits_RV[scored], [tokens[i] for i in scored], most)
        scores = dict(zip(scored, of_scored, strict=True))
    return [
        Chosen(row=row, token_id=tokens[i], score=_cut(scores.get(i), row))
        for i, (row, _) in enumerate(due)
    ]


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
