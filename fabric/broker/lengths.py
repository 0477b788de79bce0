"""How long answers turn out to be, compared with what was asked for at most, and how long requests
of each version usually are."""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.05
"""Weight of the newest answer in a running mean."""
MIN_ANSWERS = 10
"""Of fewer, or of fewer requests, the mean is not believed."""


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(SMOOTHING, 1 / self.count) * (value - self.value)


class Lengths:
    """A running mean for each power of two of ``max_tokens``: of the share that was generated, and
    where nothing was asked for of the tokens themselves. Beside them, one for each version of the
    seconds by which its requests were expected to be long."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}
        self._usual_s: dict[str, _Mean] = {}

    def came(self, digest: str, length_s: float) -> None:
        """Note how long a request for a version that came is expected to be."""
        self._usual_s.setdefault(digest, _Mean()).add(length_s)

    def usual_s(self, digest: str) -> float | None:
        """Return how long requests for a version usually are; ``None`` as long as too few came."""
        mean = self._usual_s.get(digest)
        return None if mean is None or mean.count < MIN_ANSWERS else mean.value

    def observe(self, max_tokens: int | None, num_tokens: float) -> None:
        """Note how many tokens an answer had in each choice."""
        mean = self._means.setdefault((max_tokens or 0).bit_length(), _Mean())
        mean.add(num_tokens / (max_tokens or 1))

    def expected(self, max_tokens: int | None) -> int | None:
        """Return how many tokens an answer is likely to have; ``None`` as long as too few were
        seen."""
        mean = self._means.get((max_tokens or 0).bit_length())
        if mean is None or mean.count < MIN_ANSWERS:
            return None
        return max(1, round(mean.value * (max_tokens or 1)))
