"""Guesses of the tokens that rows will choose next, for the model to verify several in one step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from fabric.engine.attention import Chunk
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.costs import StepCosts
from fabric.engine.rows import Row
from fabric.engine.runner import Runner
from fabric.engine.sampling import Draw, choose, finite_rows


class Drafter(Protocol):
    """Guesses tokens. A wrong guess costs time and never changes an answer."""

    def offers(self, row: Row, most: int) -> int:
        """Return how many tokens it could guess of a row that decodes, at most ``most``."""

    def cost_s(self, num_rows: int) -> float:
        """Return the seconds that one guess for each of so many rows takes."""

    def draft(self, depths: Mapping[Row, int]) -> dict[Row, list[int]]:
        """Return guesses for each row, at most as many as asked for and perhaps none."""


class LookupDrafter:
    """Prompt look-up: what followed when the row's last three tokens came before.

    Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    def offers(self, row: Row, most: int) -> int:
        """Return ``most`` where the row's last tokens came before, else 0."""
        return most if row.grams.find(row.tokens) is not None else 0

    def cost_s(self, num_rows: int) -> float:  # noqa: ARG002
        """Return 0: a look-up is nothing beside a step."""
        return 0.0

    def draft(self, depths: Mapping[Row, int]) -> dict[Row, list[int]]:
        """Return what followed then; past the row's end, as if it went on repeating itself."""
        drafts = {}
        for row, depth in depths.items():
            found = row.grams.find(row.tokens)
            if found is not None:
                period = len(row.tokens) - found
                drafts[row] = [row.tokens[found + i % period] for i in range(depth)]
        return drafts


class ModelDrafter:
    """A smaller model with the same vocabulary; its keys lie in blocks of the rows' own tables.

    It makes the draws that the rows will make, so it guesses well at any temperature.

    Args:
        runner: The draft model, over a cache with as many blocks as the rows'.
        step_tokens: The most tokens that it catches up on before one step.
    """

    def __init__(self, runner: Runner, *, step_tokens: int) -> None:
        self._runner = runner
        self._step_tokens = step_tokens
        self._costs = StepCosts()
        self._filled: dict[int, bytes] = {}
        """What the draft model's keys of a block are of, by the name of the row's block."""

    def offers(self, row: Row, most: int) -> int:  # noqa: ARG002
        """Return ``most``: a model always has a guess."""
        return most

    def cost_s(self, num_rows: int) -> float:
        """Return the seconds of one step of the draft model; 0 before it has run."""
        return self._costs.predict(num_rows) if self._costs.known else 0.0

    def draft(self, depths: Mapping[Row, int]) -> dict[Row, list[int]]:
        """Return guesses of the rows that it has caught up with."""
        drafts: dict[Row, list[int]] = {}
        chunks = self._catch_up(list(depths))
        while chunks:
            rows = [row for row, chunk in chunks if chunk.num_wanted]
            tokens = self._forward(chunks, rows, drafts)
            for row, token in tokens.items():
                drafts.setdefault(row, []).append(token)
            chunks = [
                (row, self._chunk(row, [token], len(row.tokens) + len(drafts[row]) - 1))
                for row, token in tokens.items()
                if len(drafts[row]) < depths[row]
            ]
        return drafts

    def _catch_up(self, rows: Sequence[Row]) -> list[tuple[Row, Chunk]]:
        budget, chunks = self._step_tokens, []
        for row in rows:
            if row.num_drafted == 0:
                self._adopt(row)
            begin = row.num_drafted
            tokens = row.tokens[begin : begin + budget]
            budget -= len(tokens)
            if tokens:
                wanted = begin + len(tokens) == len(row.tokens)
                chunks.append((row, self._chunk(row, tokens, begin, wanted=wanted)))
        return sorted(chunks, key=lambda pair: len(pair[1].tokens))

    def _chunk(self, row: Row, tokens: list[int], start: int, *, wanted: bool = True) -> Chunk:
        return Chunk(tokens=tokens, start=start, blocks=row.blocks, num_wanted=int(wanted))

    def _adopt(self, row: Row) -> None:
        """Take over the keys that were computed for other rows that begin alike."""
        names = row.block_names((len(row.tokens) - 1) // BLOCK_TOKENS)
        for block, name in zip(row.blocks, names, strict=False):
            if self._filled.get(block) != name:
                break
            row.num_drafted += BLOCK_TOKENS

    def _forward(
        self,
        chunks: Sequence[tuple[Row, Chunk]],
        rows: Sequence[Row],
        drafts: Mapping[Row, Sequence[int]],
    ) -> dict[Row, int]:
        """Run the chunks; return the next token of each of ``rows``, whose logits are wanted."""
        started = time.perf_counter()
        logits_RV = self._runner.forward([chunk for _, chunk in chunks])
        num_tokens = sum(len(chunk.tokens) for _, chunk in chunks)
        self._costs.add(num_tokens, time.perf_counter() - started)
        for row, chunk in chunks:
            self._record(row, chunk)
        finite = finite_rows(logits_RV) if rows else []
        for row, sound in zip(rows, finite, strict=True):
            if not sound:
                self._runner.cache.wipe(row.blocks)
                row.num_drafted = 0
        sound_rows = [row for row, sound in zip(rows, finite, strict=True) if sound]
        if not sound_rows:
            return {}
        draws = [
            Draw.of(
                row.active.sampling,
                seed=row.active.seed,
                choice=row.choice,
                position=row.position + len(drafts.get(row, ())),
            )
            for row in sound_rows
        ]
        return dict(zip(sound_rows, choose(logits_RV[finite], draws), strict=True))

    def _record(self, row: Row, chunk: Chunk) -> None:
        """Note which tokens the keys of the chunk's blocks are of now."""
        begin, end = chunk.start, chunk.start + len(chunk.tokens)
        row.num_drafted = end
        names = row.block_names(min(end, len(row.tokens)) // BLOCK_TOKENS)
        for i in range(begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
            if i < len(names):
                self._filled[row.blocks[i]] = names[i]
            else:
                self._filled.pop(row.blocks[i], None)
