"""Who runs in the next step: admission by free cache blocks, prefill beside decoding.

A task is admitted, first come first served, when cache blocks for the longest it can become are
free; they are taken at once, so an admitted task never waits for memory again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from fabric.engine.cache import BLOCK_TOKENS, CacheBlocks
from fabric.engine.rows import ActiveTask, Row

_SCORED_TOKENS = 128
"""The most prompt tokens scored in one step: each takes logits over the whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one row runs in a step: ``num_tokens`` from ``row.num_cached`` on."""

    row: Row
    num_tokens: int
    num_wanted: int


class Scheduler:
    """The waiting tasks, the admitted ones and the cache blocks they hold."""

    def __init__(self, blocks: CacheBlocks, *, max_rows: int, step_tokens: int) -> None:
        self._blocks = blocks
        self._max_rows = max_rows
        self._step_tokens = step_tokens
        self._waiting: deque[ActiveTask] = deque()
        self._admitted: list[ActiveTask] = []

    def __iter__(self) -> Iterator[ActiveTask]:
        """Iterate over all tasks, so that any may be removed meanwhile."""
        return iter([*self._admitted, *self._waiting])

    @property
    def num_running(self) -> int:
        """Choices of admitted tasks that have not ended."""
        return sum(active.num_open for active in self._admitted)

    @property
    def num_waiting(self) -> int:
        """Choices of tasks not yet admitted."""
        return sum(active.sampling.n for active in self._waiting)

    @property
    def cache_usage(self) -> float:
        """The part of the cache blocks that is taken."""
        return 1.0 - self._blocks.num_free / self._blocks.num_blocks

    def add(self, active: ActiveTask) -> None:
        """Queue a task that fits the cache when it is empty."""
        self._waiting.append(active)

    def remove(self, active: ActiveTask) -> list[int]:
        """Forget a task; return the cache blocks that came free."""
        if active not in self._admitted:
            self._waiting.remove(active)
            return []
        self._admitted.remove(active)
        freed = self._blocks.release(active.fork_blocks)
        for row in active.rows:
            freed += self._blocks.release(row.blocks)
            row.blocks = []
        active.fork_blocks = []
        return freed

    def retire(self, row: Row) -> None:
        """Free the blocks of a choice that has ended."""
        self._blocks.release(row.blocks)
        row.blocks = []

    def fork(self, active: ActiveTask) -> list[tuple[int, int]]:
        """Give the other choices of a task whose prompt has run the cache blocks they need.

        Returns:
            Pairs of cache blocks, from and to: the end of the prompt, to be copied for each
            choice. None where the prompt fills its last block.
        """
        first, *others = active.rows
        own, shared = active.blocks_own, first.blocks[: active.blocks_shared]
        copies = []
        for row in others:
            row.blocks = shared + active.fork_blocks[:own]
            row.num_cached = first.num_cached
            active.fork_blocks = active.fork_blocks[own:]
            self._blocks.share(shared)
            if len(active.prompt) % BLOCK_TOKENS:
                copies.append((first.blocks[len(shared)], row.blocks[len(shared)]))
        return copies

    def plan(self, now: float) -> list[Run]:
        """Admit what fits and return the next step, single-token runs first."""
        self._admit(now)
        rows = [
            row
            for active in self._admitted
            for row in active.rows
            if row.finish_reason is None and row.blocks
        ]
        runs = [_run(row, 1) for row in rows if row.num_remaining == 1]
        budget = self._step_tokens - len(runs)
        for row in rows:
            if row.num_remaining > 1 and budget > 0:
                limit = _SCORED_TOKENS if row.active.scores_prompt else budget
                runs.append(_run(row, min(row.num_remaining, budget, limit)))
                budget -= runs[-1].num_tokens
        return runs

    def _admit(self, now: float) -> None:
        num_rows = self.num_running
        while self._waiting:
            active = self._waiting[0]
            num_rows += active.sampling.n
            if num_rows > self._max_rows or active.blocks_needed > self._blocks.num_free:
                return
            active = self._waiting.popleft()
            first = active.rows[0]
            first.blocks = self._blocks.take(active.blocks_shared + active.blocks_own)
            active.fork_blocks = self._blocks.take((active.sampling.n - 1) * active.blocks_own)
            active.usage = active.usage.model_copy(update={"queue_s": now - active.received_at})
            self._admitted.append(active)


def _run(row: Row, num_tokens: int) -> Run:
    if row.active.scores_prompt and row.num_cached < len(row.active.prompt):
        num_wanted = num_tokens
    else:
        num_wanted = int(num_tokens == row.num_remaining)
    return Run(row=row, num_tokens=num_tokens, num_wanted=num_wanted)
