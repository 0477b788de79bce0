"""The fleet-wide retry budget: a storm of failures never becomes a storm of retries."""

from __future__ import annotations

from fabric.broker.settings import BrokerSettings


class RetryBudget:
    """A token bucket. Each admitted request adds ``retry_ratio``, time adds ``retry_min_per_s``.

    It starts full (``retry_burst``), so that the requests a lost site leaves behind under a light
    load all go on at once; later retries wait for their token.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._tokens = settings.retry_burst
        self._refilled_at: float | None = None

    def deposit(self) -> None:
        """A request was admitted."""
        self._add(self._settings.retry_ratio)

    def refill(self, now: float) -> None:
        """Time has passed."""
        if self._refilled_at is not None:
            self._add((now - self._refilled_at) * self._settings.retry_min_per_s)
        self._refilled_at = now

    @property
    def allows(self) -> bool:
        """Whether a retry may be made now."""
        return self._tokens >= 1.0

    @property
    def is_plenty(self) -> bool:
        """Whether more than half is left: what is not yet a retry takes no more than that."""
        return 2 * self._tokens > self._settings.retry_burst

    def withdraw(self) -> None:
        """A retry is made."""
        self._tokens -= 1.0

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._settings.retry_burst, self._tokens + tokens)
