"""What rank 0 tells the others to do, as whole numbers."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

from fabric.engine.attention import Chunk
from fabric.engine.cache import BLOCK_TOKENS


class Order(enum.IntEnum):
    """The first number of an order; what follows depends on it."""

    OPEN = 0
    """A ``Opening`` as JSON: load your part of a model."""
    STEP = 1
    """Run chunks; wanted are their logits."""
    STEP_HIDDEN = 2
    """The same; wanted are all tokens' last hidden states too."""
    COPY = 3
    """Copy a cache block to another."""
    WIPE = 4
    """Zero cache blocks."""
    CLOSE = 5
    """Give the model up."""
    END = 6
    """End the process."""


def write_text(text: str) -> list[int]:
    """Return a text as numbers."""
    return list(text.encode())


def read_text(numbers: Sequence[int]) -> str:
    """Return the text that ``write_text`` was given."""
    return bytes(numbers).decode()


def write_chunks(chunks: Sequence[Chunk]) -> list[int]:
    """Return a step's chunks as numbers: of each table only the blocks that it needs."""
    numbers: list[int] = []
    for chunk in chunks:
        num_blocks = -(-(chunk.start + len(chunk.tokens)) // BLOCK_TOKENS)
        numbers += (chunk.start, chunk.num_wanted, len(chunk.tokens), num_blocks)
        numbers += chunk.tokens
        numbers += chunk.blocks[:num_blocks]
    return numbers


def read_chunks(numbers: Sequence[int]) -> list[Chunk]:
    """Return the chunks that ``write_chunks`` was given."""
    return list(_read_chunks(numbers))


def _read_chunks(numbers: Sequence[int]) -> Iterator[Chunk]:
    at = 0
    while at < len(numbers):
        start, num_wanted, num_tokens, num_blocks = numbers[at : at + 4]
        tokens_end = at + 4 + num_tokens
        yield Chunk(
            tokens=numbers[at + 4 : tokens_end],
            start=start,
            blocks=numbers[tokens_end : tokens_end + num_blocks],
            num_wanted=num_wanted,
        )
        at = tokens_end + num_blocks
