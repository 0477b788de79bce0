"""What a step costs, learned from the steps that were run."""

from __future__ import annotations

from collections import deque
from statistics import median

_REMEMBERED = 9
"""Steps of one size whose median is its cost: one slow step changes nothing."""

_UNKNOWN_S = 0.05
"""A step of one token before any has run."""

_UNKNOWN_TOKEN_S = 0.0005


class StepCosts:
    """Seconds of a step by its number of tokens: decoding rows and prefill weigh the same.

    Sizes are remembered by powers of two and joined by straight lines; a step costs at least what
    a smaller one does.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, float]]] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        sizes = self._seen.setdefault(num_tokens.bit_length(), deque(maxlen=_REMEMBERED))
        sizes.append((num_tokens, seconds))

    def predict(self, num_tokens: int) -> float:
        """Return the seconds that a step of ``num_tokens`` should take; 0 for none."""
        if num_tokens == 0:
            return 0.0
        known = self._known()
        if not known:
            return _UNKNOWN_S + num_tokens * _UNKNOWN_TOKEN_S
        before, after = known[0], known[-1]
        for size, seconds in known:
            if size <= num_tokens:
                before = (size, seconds)
            elif size < after[0]:
                after = (size, seconds)
        if num_tokens <= known[0][0]:
            return known[0][1]
        if num_tokens >= known[-1][0]:
            # Larger than any seen: by its rate, which is the worst that larger steps do.
            return before[1] * num_tokens / before[0]
        part = (num_tokens - before[0]) / (after[0] - before[0])
        return before[1] + part * (after[1] - before[1])

    def largest(self, seconds: float, *, least: int, most: int) -> int:
        """Return the most tokens, from ``least`` to ``most``, whose step stays within ``seconds``.

        ``least`` if none does.
        """
        low, high = least, max(least, most)
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _known(self) -> list[tuple[int, float]]:
        points, floor = [], 0.0
        for _, steps in sorted(self._seen.items()):
            floor = max(floor, median(seconds for _, seconds in steps))
            points.append((round(median(size for size, _ in steps)), floor))
        return points
