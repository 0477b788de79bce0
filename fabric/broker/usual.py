"""What replicas of a version usually do: for those of which nothing fresh is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

SMOOTHING = 0.2
"""Weight of the newest observation in a replica's running mean."""
USUAL_SMOOTHING = 0.02
"""The same where many replicas are observed."""
DRIFT = 0.25
"""A change of a mean that others must hear of."""


def mean(old: float, new: float, smoothing: float = SMOOTHING) -> float:
    """Return a running mean with one more observation; 0 is none."""
    if not old or not new:
        return new or old
    return old + smoothing * (new - old)


@dataclass(slots=True)
class Rates:
    """Seconds to the first token of a short prompt, and tokens per second; 0 if unknown."""

    overhead_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0

    def add(self, new: Rates, smoothing: float = SMOOTHING) -> None:
        """Take one more observation into the means."""
        self.overhead_s = mean(self.overhead_s, new.overhead_s, smoothing)
        self.prefill_tokens_per_s = mean(
            self.prefill_tokens_per_s, new.prefill_tokens_per_s, smoothing
        )
        self.decode_tokens_per_s = mean(
            self.decode_tokens_per_s, new.decode_tokens_per_s, smoothing
        )

    def values(self) -> tuple[float, float, float]:
        """Return them in order."""
        return self.overhead_s, self.prefill_tokens_per_s, self.decode_tokens_per_s


@dataclass(slots=True)
class _Told:
    """Means as they are, and as others were told of them last."""

    means: Rates = field(default_factory=Rates)
    told: Rates = field(default_factory=Rates)

    def add(self, new: Rates) -> bool:
        """Return whether others must be told anew."""
        self.means.add(new, USUAL_SMOOTHING)
        pairs = zip(self.means.values(), self.told.values(), strict=True)
        if all(abs(now - before) <= DRIFT * before for now, before in pairs):
            return False
        self.told = replace(self.means)
        return True


class Usual:
    """Running means of each version, at a site and over all; they are never forgotten."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], _Told] = {}
        self._anywhere: dict[str, _Told] = {}

    def observe(self, digest: str, site: str, new: Rates, sites: Iterable[str]) -> list[str]:
        """Note what one attempt showed; return those of the sites where something else is usual
        now."""
        changed = []
        if self._at.setdefault((digest, site), _Told()).add(new):
            changed.append(site)
        if self._anywhere.setdefault(digest, _Told()).add(new):
            changed += [other for other in sites if (digest, other) not in self._at]
        return changed

    def of(self, digest: str, site: str) -> Rates:
        """Return what is usual at a site, else anywhere, else unknown."""
        told = self._at.get((digest, site)) or self._anywhere.get(digest)
        return told.told if told is not None else Rates()
