"""Which cache blocks are free, who holds them, and what finished ones can be used for again.

A full block is named by a hash over its tokens and all before them, so two rows that begin alike
hold the same blocks. The chain starts from a key that only one tenant's rows share (``PrefixKey``).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from fabric.engine.cache import BLOCK_TOKENS

_DIGEST_BYTES = 16


class PrefixKey:
    """Starts the hash chains of an engine: nobody outside can compute them.

    Whatever changes what prefill computes for the same tokens (an adapter, a program that edits
    activations) must be named in ``variant``; rows that differ in it share nothing.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def start(self, salt: str, *, variant: str = "") -> bytes:
        """Return the name that precedes the first block of a tenant's rows."""
        message = f"{len(salt)}:{salt}{variant}".encode()
        return hmac.digest(self._secret, message, "sha256")[:_DIGEST_BYTES]


def next_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the name of the block that holds these tokens after ``before``."""
    content = array("q", tokens).tobytes()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES, key=before).digest()


class CacheBlocks:
    """The blocks of a cache: free, held by one or several rows, or kept for who begins alike.

    Kept blocks are free too: the one used longest ago is given out first, when no other is left.
    Block 0 is never given out: tables are padded with it, and what it holds stays finite.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_queried_tokens = 0
        """Tokens that were looked up, since the start."""
        self.num_found_tokens = 0
        """Tokens of them that were there."""
        self._empty = list(range(num_blocks, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * (num_blocks + 1)
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._empty) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Free blocks that hold a named prefix."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Return ``count`` blocks, which the caller holds from now on."""
        assert count <= self.num_free, "the scheduler makes room before it takes"
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._named[self._names.pop(block)]
            self._num_holders[block] = 1
            blocks.append(block)
        return blocks

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest run of ``names`` from its start, held by the caller."""
        blocks: list[int] = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            blocks.append(block)
        self.num_queried_tokens += len(names) * BLOCK_TOKENS
        self.num_found_tokens += len(blocks) * BLOCK_TOKENS
        self.share(blocks)
        return blocks

    def num_findable(self, names: Sequence[bytes]) -> tuple[int, int]:
        """Return how many blocks ``find`` would give, and how many of them are free now."""
        num_found = num_free = 0
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            num_found += 1
            num_free += block in self._kept
        return num_found, num_free

    def name(self, block: int, name: bytes) -> None:
        """Let a full block that the caller holds be found by others; the first one stays."""
        if name not in self._named and block not in self._names:
            self._named[name] = block
            self._names[block] = name

    def share(self, blocks: Sequence[int]) -> None:
        """Let one more row hold these blocks, which must not be written any more."""
        for block in blocks:
            self._num_holders[block] += 1
            self._kept.pop(block, None)

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Let go of a row's blocks; named ones are kept, the row's last one to go first.

        Returns:
            Those that came free and have no name.
        """
        emptied = []
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._names:
                self._kept[block] = None
            else:
                emptied.append(block)
        self._empty += emptied
        return emptied

    def discard(self, blocks: Sequence[int]) -> list[int]:
        """Let go of blocks that nobody shall find again; return those that came free."""
        for block in blocks:
            name = self._names.pop(block, None)
            if name is not None:
                del self._named[name]
        return self.release(blocks)
