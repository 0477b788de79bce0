"""What a step costs, learned from the steps that were run."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
        self._curve: tuple[list[int], list[float]] | None = None

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        sizes = self._seen.setdefault(num_tokens.bit_length(), deque(maxlen=_REMEMBERED))
        sizes.append((num_tokens, seconds))
        self._curve = None

    @property
    def known(self) -> bool:
        """Whether a step has run."""
        return bool(self._seen)

    def predict(self, num_tokens: int) -> float:
        """Return the seconds that a step of ``num_tokens`` should take; 0 for none."""
        return float(self.predict_all([num_tokens])[0])

    def predict_all(self, nums_tokens: ArrayLike) -> NDArray[np.float64]:
        """Return the seconds that steps of so many tokens should take; 0 for none."""
        sizes = np.asarray(nums_tokens, dtype=np.float64)
        if not self._seen:
            return np.where(sizes > 0, _UNKNOWN_S + sizes * _UNKNOWN_TOKEN_S, 0.0)
        at, seconds = self._known()
        # Larger than any seen: by its rate, which is the worst that larger steps do.
        beyond = np.maximum(1.0, sizes / at[-1])
        return np.where(sizes > 0, np.interp(sizes, at, seconds) * beyond, 0.0)

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

    def _known(self) -> tuple[list[int], list[float]]:
        if self._curve is None:
            at, floors, floor = [], [], 0.0
            for _, steps in sorted(self._seen.items()):
                floor = max(floor, median(seconds for _, seconds in steps))
                at.append(round(median(size for size, _ in steps)))
                floors.append(floor)
            self._curve = at, floors
        return self._curve
