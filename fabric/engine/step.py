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
from fabric.engine.constraints import Matcher
from fabric.engine.device import put
from fabric.engine.programs.gathering import Gathering
from fabric.engine.programs.step import ProgramStep
from fabric.engine.rows import ActiveTask, Row
from fabric.engine.runner import Chunk, Runner
from fabric.engine.sampling import Draw, Score, choose, finite_rows, score
from fabric.engine.scheduler import Run, Scheduler
from fabric.errors import ConstraintFailed, FabricError, ProgramFailed, RowFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The next token of one row; ``score`` if log probabilities were asked for."""

    row: Row
    token_id: int
    score: Score | None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a step gave, by task. Those in ``failed`` get no token and end.

    A row with a draft may get several tokens, in their order. What rows in ``spoilt`` have in the
    cache is not sound: a guess that was not theirs has left NaN there.
    """

    chosen: dict[ActiveTask, list[Chosen]] = field(default_factory=dict)
    failed: dict[ActiveTask, FabricError] = field(default_factory=dict)
    spoilt: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A position whose token is to be chosen: after a row's tokens and those ``ahead`` of it.

    ``index`` is of its logits. If its token is ``guess``, the row's next place counts too.
    """

    row: Row
    index: int
    ahead: tuple[int, ...] = ()
    guess: int | None = None


def run_step(
    runs: Sequence[Run], runner: Runner, scheduler: Scheduler, gathering: Gathering
) -> Outcome:
    """Run the model over ``runs``, advance their rows' caches and choose tokens.

    Tokens are chosen, not yet appended to the rows.
    """
    chunks = [
        Chunk(
            tokens=_tokens(run),
            start=run.row.num_cached,
            blocks=run.row.blocks,
            num_wanted=run.num_wanted,
            deltas=run.row.active.deltas,
        )
        for run in runs
    ]
    programs = gathering.programs_of(runs)
    if any(run.row.active.embeds for run in runs):
        logits_WV, hidden_NH = runner.forward_hidden(chunks, programs)
        _gather(runs, hidden_NH)
    else:
        logits_WV = runner.forward(chunks, programs)
    if programs is not None:
        logits_WV = programs.logits(logits_WV)
    finite = finite_rows(logits_WV)
    outcome = Outcome()
    due: list[_Place] = []
    end = 0
    for run in runs:
        begin, end = end, end + run.num_wanted
        sound = finite[begin:end]
        num_sound = sound.index(False) if False in sound else len(sound)
        if num_sound < len(sound):
            if not (run.draft and num_sound):
                outcome.failed[run.row.active] = _not_finite(run.row.active)
                continue
            run.row.spoilt = True
            outcome.spoilt.append(run.row)
        _score_prompt(run, logits_WV[begin:end])
        run.row.num_cached += run.num_own
        if run.num_wanted:
            scheduler.keep(run.row)
        if run.draft:
            due += _places(run, begin, num_sound)
        elif run.row.num_remaining == 0:
            due += [
                _Place(row=row, index=end - 1) for row in _next_rows(run.row, runner, scheduler)
            ]
    _choose_all(due, logits_WV, outcome, programs)
    if programs is not None:
        programs.end()
        outcome.failed |= programs.failed()
    return outcome


def _not_finite(active: ActiveTask) -> FabricError:
    reason = "the model's output for it is not finite"
    if active.program is None:
        return RowFailed(reason=reason)
    return ProgramFailed(run=active.program.execution.run.id, reason=reason)


def _tokens(run: Run) -> list[int]:
    begin = run.row.num_cached
    return [*run.row.tokens[begin : begin + run.num_own], *run.draft]


def _places(run: Run, begin: int, num: int) -> list[_Place]:
    """Return the first ``num`` positions of a run with a draft, whose logits start at ``begin``."""
    guesses = [*run.draft, None]
    return [
        _Place(row=run.row, index=begin + i, ahead=run.draft[:i], guess=guesses[i])
        for i in range(num)
    ]


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


def _choose_all(
    due: Sequence[_Place], logits_WV: Tensor, outcome: Outcome, programs: ProgramStep | None
) -> None:
    """Choose the tokens of the places; a row whose constraint leaves none fails its task."""
    constrained = _constrained(due, logits_WV.shape[1], outcome)
    if not constrained:
        return
    due = [place for place, _ in constrained]
    indices = [place.index for place in due]
    whole = indices == list(range(len(logits_WV)))
    logits_RV = logits_WV if whole else logits_WV[put(indices, logits_WV.device)]
    adjustments = {
        i: _adjustment(place, allowed)
        for i, (place, allowed) in enumerate(constrained)
        if allowed is not None or changes_logits(place.row.active.sampling)
    }
    adjusted_RV = adjust(logits_RV, adjustments)
    possible = finite_rows(adjusted_RV) if adjustments else [True] * len(due)
    if not all(possible):
        adjusted_RV = torch.where(put(possible, logits_RV.device)[:, None], adjusted_RV, logits_RV)
    tokens = choose(adjusted_RV, [_draw(place) for place in due])
    for i, place in enumerate(due):
        if programs is not None and place.row.active.program is not None:
            tokens[i] = programs.sample(place.row, tokens[i])
    reached = _reached(due, tokens, possible)
    scores = _score_chosen([(i, due[i].row) for i in reached if possible[i]], tokens, logits_RV)
    for i in reached:
        row = due[i].row
        if not possible[i]:
            reason = "the model gives no probability to any token that may follow"
            outcome.failed[row.active] = ConstraintFailed(reason=reason)
            continue
        chosen = Chosen(row=row, token_id=tokens[i], score=_cut(scores.get(i), row))
        outcome.chosen.setdefault(row.active, []).append(chosen)


def _constrained(
    due: Sequence[_Place], vocabulary: int, outcome: Outcome
) -> list[tuple[_Place, NDArray[np.bool_] | None]]:
    """Return the places with what constraints allow there; those no guess can lead to are left out.

    A task whose row may not go on fails.
    """
    constrained: list[tuple[_Place, NDArray[np.bool_] | None]] = []
    ahead: dict[Row, Matcher | None] = {}
    for place in due:
        row = place.row
        if row.matcher is None:
            constrained.append((place, None))
            continue
        matcher = ahead[row] if place.ahead else row.matcher
        ahead[row] = None
        if matcher is None:
            continue
        try:
            constrained.append((place, matcher.allowed(vocabulary)))
        except ConstraintFailed as error:
            if not place.ahead:
                outcome.failed[row.active] = error
            continue
        if place.guess is not None:
            ahead[row] = matcher.after(place.guess)
    return [pair for pair in constrained if pair[0].row.active not in outcome.failed]


def _reached(due: Sequence[_Place], tokens: Sequence[int], possible: Sequence[bool]) -> list[int]:
    """Return the places whose tokens count: those after guesses that were all right.

    Where a constraint leaves no token after a guess, the next step will find the same.
    """
    reached, missed = [], set()
    for i, place in enumerate(due):
        if place.row in missed or (place.ahead and not possible[i]):
            missed.add(place.row)
            continue
        reached.append(i)
        if tokens[i] != place.guess:
            missed.add(place.row)
    return reached


def _adjustment(place: _Place, allowed: NDArray[np.bool_] | None) -> Adjustment:
    active = place.row.active
    return Adjustment(
        sampling=active.sampling,
        prompt=active.prompt,
        generated=[*place.row.tokens[len(active.prompt) :], *place.ahead],
        allowed=allowed,
    )


def _score_chosen(
    places: Sequence[tuple[int, Row]], tokens: Sequence[int], logits_RV: Tensor
) -> dict[int, Score]:
    """Return the scores that were asked for: the model's own, before anything was adjusted."""
    asked = {i: row.active.sampling.logprobs for i, row in places}
    scored = [i for i, num_top in asked.items() if num_top is not None]
    if not scored:
        return {}
    most = max(asked[i] or 0 for i in scored)
    of_scored = score(logits_RV[scored], [tokens[i] for i in scored], most)
    return dict(zip(scored, of_scored, strict=True))


def _draw(place: _Place) -> Draw:
    row, active = place.row, place.row.active
    position = row.position + len(place.ahead)
    # Runs of a program are choices of nothing: each draws as a request of its own would.
    choice = 0 if active.program is not None else row.choice
    return Draw.of(active.sampling, seed=active.seed, choice=choice, position=position)


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
