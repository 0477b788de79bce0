"""Who runs in the next step: prefill beside decoding, memory as it is needed.

Every task has a time at which it is due: when it came, plus the patience of its tier, or half its
deadline if that is less. Whoever is due first comes first, in the queue, in the step and in the
cache; new tasks are due later and later, so nobody waits for ever. Cache blocks are taken as rows
grow. When none is left, the task that is due last gives its blocks up and is computed again later.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from fabric.engine.blocks import CacheBlocks
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.costs import StepCosts
from fabric.engine.rows import ActiveTask, Row

_SCORED_TOKENS = 128
"""The most prompt tokens scored in one step: each takes logits over the whole vocabulary."""

_LEAST_PREFILL = BLOCK_TOKENS
"""Prefill tokens that a step always has room for, however long its rows must wait for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one row runs in a step: ``num_tokens`` from ``row.num_cached`` on, the last of them
    those of ``draft``, which are not the row's yet."""

    row: Row
    num_tokens: int
    num_wanted: int
    draft: tuple[int, ...] = ()

    @property
    def num_own(self) -> int:
        """How many of the tokens are the row's."""
        return self.num_tokens - len(self.draft)


class Scheduler:
    """The waiting tasks, the admitted ones and the cache blocks they hold.

    Args:
        blocks: Of the cache.
        costs: Of steps, as far as they are known.
        max_rows: The most choices that run at once.
        step_tokens: The most tokens of a step.
        slowdown: How many times longer than decoding alone a step with prefill may take; see
            ``EngineConfig``.
    """

    def __init__(
        self,
        blocks: CacheBlocks,
        costs: StepCosts,
        *,
        max_rows: int,
        step_tokens: int,
        slowdown: float,
    ) -> None:
        self._blocks = blocks
        self._costs = costs
        self._max_rows = max_rows
        self._step_tokens = step_tokens
        self._slowdown = slowdown
        self._waiting: list[ActiveTask] = []
        self._admitted: list[ActiveTask] = []
        self._suspect: list[int] = []
        self.num_preempted = 0
        """Tasks that gave their blocks up, since the start."""

    def __iter__(self) -> Iterator[ActiveTask]:
        """Iterate over all tasks, so that any may be removed meanwhile."""
        return iter([*self._admitted, *self._waiting])

    @property
    def num_running(self) -> int:
        """Choices of admitted tasks that have not ended."""
        return sum(active.num_open for active in self._admitted)

    @property
    def num_waiting(self) -> int:
        """Choices of tasks not admitted now."""
        return sum(active.num_open for active in self._waiting)

    @property
    def cache_usage(self) -> float:
        """The part of the cache blocks that rows hold."""
        return 1.0 - self._blocks.num_free / self._blocks.num_blocks

    @property
    def num_due_tokens(self) -> int:
        """Prompt and recomputed tokens that wait to run."""
        return sum(max(0, row.num_remaining - 1) for active in self for row in active.live_rows)

    def add(self, active: ActiveTask) -> None:
        """Queue a task that fits the cache when it is empty."""
        bisect.insort(self._waiting, active, key=_due_at)

    def remove(self, active: ActiveTask, *, poisoned: bool = False) -> None:
        """Forget a task. What a ``poisoned`` one computed is found by nobody."""
        if active not in self._admitted:
            self._waiting.remove(active)
            return
        self._admitted.remove(active)
        self._release(active, poisoned=poisoned)

    def retire(self, row: Row) -> None:
        """Free the blocks of a choice that has ended."""
        freed = self._blocks.release(row.blocks)
        self._suspect += freed if row.spoilt else []
        row.blocks = []

    def take_suspect(self) -> list[int]:
        """Return, once, the blocks that came free before logits showed what is in them."""
        suspect, self._suspect = self._suspect, []
        return suspect

    def fork(self, active: ActiveTask) -> list[tuple[int, int]]:
        """Give the other choices of a task whose prompt has run its blocks.

        Returns:
            Pairs of cache blocks, from and to: the end of the prompt, to be copied for each
            choice. None where the prompt fills its last block.
        """
        first, *others = active.rows
        shared = first.blocks[: active.blocks_shared]
        copies = []
        for row in others:
            own = [active.fork_blocks.pop()] if active.fork_blocks else []
            row.blocks = shared + own
            row.num_cached = row.num_sound = first.num_cached
            row.num_drafted = min(first.num_drafted, len(shared) * BLOCK_TOKENS)
            row.names, row.num_named = list(first.names), first.num_named
            self._blocks.share(shared)
            copies += [(first.blocks[len(shared)], block) for block in own]
        active.forked = True
        return copies

    def keep(self, row: Row) -> None:
        """Let others find the row's full blocks; finite logits have shown that they are sound."""
        row.num_sound = row.num_cached
        num_full = row.num_cached // BLOCK_TOKENS
        if num_full > row.num_named:
            for block, name in zip(
                row.blocks[row.num_named : num_full],
                row.block_names(num_full)[row.num_named :],
                strict=True,
            ):
                self._blocks.name(block, name)
            row.num_named = num_full

    def lend(self, row: Row, most: int) -> int:
        """Return how many tokens more than its next one a row may hold, at most ``most``.

        Nobody is preempted for guesses, and every other row can still grow by a block.
        """
        spare = max(0, self._blocks.num_free - self.num_running)
        num_tokens = row.num_cached + 1
        room = (len(row.blocks) + spare) * BLOCK_TOKENS - num_tokens
        most = min(most, room)
        missing = -(-(num_tokens + most) // BLOCK_TOKENS) - len(row.blocks)
        row.blocks += self._blocks.take(max(0, missing))
        return most

    def recompute(self, active: ActiveTask) -> None:
        """Compute a running task again later."""
        self._preempt(active)

    def plan(self, now: float) -> list[Run]:
        """Admit what fits and return the next step, single-token runs first."""
        self._admit(now)
        runs = self._plan_decoding()
        budget, first = self._budget(len(runs)), True
        for active in list(self._admitted):
            for row in active.live_rows:
                if not row.decodes and budget > 0 and active in self._admitted:
                    run = self._plan_prefill(row, budget, first=first)
                    if run is not None:
                        runs.append(run)
                        budget -= run.num_tokens
                        first = False
        admitted = set(self._admitted)
        runs = [run for run in runs if run.row.active in admitted]
        return sorted(runs, key=lambda run: run.num_tokens > 1)

    def _plan_decoding(self) -> list[Run]:
        runs = []
        for active in list(self._admitted):
            for row in active.live_rows:
                if active not in self._admitted or not row.decodes:
                    continue
                if self._grow(row, row.num_cached + 1):
                    runs.append(_run(row, 1))
                else:
                    self._preempt(active)
        return runs

    def _budget(self, num_decoding: int) -> int:
        """Return how many tokens of prefill the step has room for.

        What prefill makes the decoding rows wait, it spares those that have no token yet: the more
        they are, the longer may the others wait.
        """
        most = self._step_tokens - num_decoding
        if not num_decoding:
            return most
        num_due = min(self.num_running + self.num_waiting, self._max_rows) - num_decoding
        patience = self._slowdown * (1 + max(0, num_due) / num_decoding)
        pause_s = patience * self._costs.predict(num_decoding)
        least = num_decoding + _LEAST_PREFILL
        within = self._costs.largest(pause_s, least=least, most=self._step_tokens)
        return min(most, within - num_decoding)

    def _plan_prefill(self, row: Row, budget: int, *, first: bool) -> Run | None:
        active = row.active
        if not row.blocks and not active.reads_all:
            self._find(row)
        num_tokens = min(row.num_remaining, budget)
        if active.program is not None:
            num_tokens = active.program.num_due(row, budget, first=first)
            if num_tokens == 0:
                return None
        if active.scores_due:
            num_tokens = min(num_tokens, _SCORED_TOKENS)
        completes = num_tokens == row.num_remaining and not active.forked
        num_extra = active.num_fork_blocks if completes else 0
        if not self._grow(row, row.num_cached + num_tokens, num_extra):
            if len(self._admitted) > 1 or not row.blocks:
                return None
            # Alone, and the cache is full of its own: run what there is room for.
            num_tokens = len(row.blocks) * BLOCK_TOKENS - row.num_cached
            return _run(row, num_tokens) if 0 < num_tokens < row.num_remaining else None
        if num_extra:
            active.fork_blocks = self._blocks.take(num_extra)
        return _run(row, num_tokens)

    def _find(self, row: Row) -> None:
        """Start a row with the blocks that others have computed, its last token excepted."""
        names = row.block_names(row.num_reusable // BLOCK_TOKENS)
        row.blocks = self._blocks.find(names)
        row.num_cached = row.num_sound = len(row.blocks) * BLOCK_TOKENS
        row.num_named = len(row.blocks)
        active = row.active
        if not active.looked_up:
            active.looked_up = True
            found = min(row.num_cached, len(active.prompt))
            active.usage = active.usage.model_copy(update={"cached_prompt_tokens": found})

    def _grow(self, row: Row, num_tokens: int, num_extra: int = 0) -> bool:
        """Let the row hold so many tokens, at the cost of tasks that are due later than its own."""
        missing = -(-num_tokens // BLOCK_TOKENS) - len(row.blocks)
        while missing + num_extra > self._blocks.num_free:
            last = self._admitted[-1]
            if last is row.active:
                return False
            self._preempt(last)
        row.blocks += self._blocks.take(max(0, missing))
        return True

    def _preempt(self, active: ActiveTask) -> None:
        self._admitted.remove(active)
        self._release(active)
        active.restart()
        self.num_preempted += 1
        self.add(active)

    def _release(self, active: ActiveTask, *, poisoned: bool = False) -> None:
        self._blocks.release(active.fork_blocks)
        active.fork_blocks = []
        for row in active.rows:
            if poisoned:
                self._suspect += self._blocks.discard(row.blocks)
            else:
                freed = self._blocks.release(row.blocks)
                self._suspect += freed if row.spoilt or row.num_cached > row.num_sound else []
            row.blocks, row.num_cached, row.num_named, row.num_sound = [], 0, 0, 0
            row.num_drafted = 0

    def _admit(self, now: float) -> None:
        while self._waiting:
            active = self._waiting[0]
            while not self._has_room(active):
                last = self._admitted[-1]
                if last.rank <= active.rank or last.due_at <= active.due_at:
                    return
                self._preempt(last)
            self._waiting.remove(active)
            bisect.insort(self._admitted, active, key=_due_at)
            if active.usage.queue_s == 0.0:
                queue_s = now - active.received_at
                active.usage = active.usage.model_copy(update={"queue_s": queue_s})

    def _has_room(self, active: ActiveTask) -> bool:
        """Say whether a task can start: its tokens fit, and the others can grow by a block."""
        if not self._admitted:
            return True
        num_running = self.num_running
        if num_running + active.num_open > self._max_rows:
            return False
        needed = active.num_fork_blocks
        for row in active.live_rows:
            needed += -(-len(row.tokens) // BLOCK_TOKENS)
            if not active.reads_all:
                names = row.block_names(row.num_reusable // BLOCK_TOKENS)
                num_found, num_free = self._blocks.num_findable(names)
                needed -= num_found - num_free
        promised = sum(
            max(0, -(-len(row.tokens) // BLOCK_TOKENS) - len(row.blocks))
            for other in self._admitted
            for row in other.live_rows
        )
        return needed + promised + num_running <= self._blocks.num_free


def _due_at(active: ActiveTask) -> float:
    return active.due_at


def _run(row: Row, num_tokens: int) -> Run:
    if row.active.program is not None:
        num_wanted = row.active.program.num_wanted(row, num_tokens)
    elif row.active.scores_due and row.num_cached < len(row.active.prompt):
        num_wanted = num_tokens
    else:
        num_wanted = int(num_tokens == row.num_remaining)
    return Run(row=row, num_tokens=num_tokens, num_wanted=num_wanted)
