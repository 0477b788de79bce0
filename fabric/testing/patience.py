"""How long tests wait: until what they wait for is there, or surely will not be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

PATIENCE_S = 20.0
"""What a machine that is busy with other things may take for anything short."""

T = TypeVar("T")


async def within(awaited: Awaitable[T], timeout_s: float = PATIENCE_S) -> T:
    """Return what an awaitable gives.

    Raises:
        TimeoutError: It gives nothing within ``timeout_s`` seconds, and was cancelled.
    """
    async with asyncio.timeout(timeout_s):
        return await awaited
