"""How fast data comes from one site to another, learned from what was moved."""

from __future__ import annotations

from collections.abc import Mapping

SMOOTHING = 0.2
"""Weight of the newest transfer in a pair's running mean."""
MIN_BYTES = 1_000_000
"""Of less, the time says nothing of the link."""
MAX_BYTES_PER_S = 12.5e9
"""100 Gbit/s: what seems to come faster was there already."""


class Links:
    """A running mean of bytes per second for each pair of sites (from, to)."""

    def __init__(self) -> None:
        self._rates: dict[str, dict[str, float]] = {}

    @property
    def bytes_per_s(self) -> Mapping[str, Mapping[str, float]]:
        """The means, from a site to others; a pair that moved nothing yet has none."""
        return self._rates

    def observe(self, source: str, target: str, num_bytes: int, seconds: float) -> None:
        """Note a transfer; one too small or too fast to be one is left out."""
        if num_bytes < MIN_BYTES or seconds * MAX_BYTES_PER_S < num_bytes:
            return
        rate, rates = num_bytes / seconds, self._rates.setdefault(source, {})
        mean = rates.get(target, rate)
        rates[target] = mean + SMOOTHING * (rate - mean)
