"""Requests, tokens and concurrency of callers: counted exactly, in the memory of one hub.

Nothing here waits, so between a question and the count that follows it nobody else is admitted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fabric.auth import Identity, Limit
from fabric.errors import RateLimited, RequestOverLimit, TooManyRequests

PERIOD_S = 60.0
RETRY_AFTER_S = 1.0
MAX_COUNTS = 4096
"""How many callers are remembered before those are forgotten whose minute is over."""


@dataclass(slots=True, eq=False)
class _Entry:
    at_s: float
    amount: int


class Window:
    """What was taken in the last ``PERIOD_S``: the sum of any such time is exact."""

    __slots__ = ("_entries", "taken")

    def __init__(self) -> None:
        self.taken = 0
        self._entries: deque[_Entry] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, now_s: float, amount: int) -> _Entry:
        """Count an amount; the caller has asked whether there is room."""
        entry = _Entry(now_s, amount)
        self._entries.append(entry)
        self.taken += amount
        return entry

    def correct(self, entry: _Entry, amount: int) -> None:
        """Let an entry count less than was taken for it; one that is over counts nothing."""
        unused = max(0, entry.amount - amount)
        entry.amount -= unused
        self.taken -= unused

    def expire(self, now_s: float) -> None:
        """Forget what is over."""
        while self._entries and self._entries[0].at_s + PERIOD_S <= now_s:
            entry = self._entries.popleft()
            self.taken -= entry.amount
            entry.amount = 0

    def wait_s(self, now_s: float, amount: int, limit: int) -> float:
        """Return the seconds until there is room for an amount, which is at most the limit."""
        excess, free_at_s = self.taken + amount - limit, now_s
        for entry in self._entries:
            if excess <= 0:
                break
            excess -= entry.amount
            free_at_s = entry.at_s + PERIOD_S
        return free_at_s - now_s

    def reset_s(self, now_s: float) -> float:
        """Return the seconds until nothing is taken."""
        return self._entries[-1].at_s + PERIOD_S - now_s if self._entries else 0.0


@dataclass(slots=True)
class _Count:
    """What those count who share one limit."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)

    def expire(self, now_s: float) -> None:
        self.requests.expire(now_s)
        self.tokens.expire(now_s)

    @property
    def is_used(self) -> bool:
        return bool(self.requests or self.tokens)


@dataclass(slots=True, eq=False)
class Turn:
    """One request in flight: what it has taken, to be given back."""

    sharers: tuple[str, ...]
    tokens: list[tuple[Window, _Entry]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is left of one limit, for ``x-ratelimit-*``."""

    what: str
    limit: int
    remaining: int
    reset_s: float


class Limiter:
    """Counts the requests of a hub.

    Args:
        monotonic: Seconds that only grow.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._num_in_flight: Counter[str] = Counter()
        self._counts: dict[str, _Count] = {}

    def enter(
        self, caller: Identity, limits: Iterable[tuple[str, Limit]], *, num_requests: int = 1
    ) -> Turn:
        """Count a request, in flight and in the minute; one that is refused counts nowhere.

        Args:
            caller: Who asks; its own limit of requests in flight holds, too.
            limits: What holds for the caller, by who shares it.
            num_requests: How many requests of the minute it is; none for a part of one.

        Raises:
            TooManyRequests: There are as many in flight as there may be.
            RateLimited: The requests of a minute are used up.
        """
        now_s = self._monotonic()
        _, project, key, *_ = caller.subjects
        self._check_in_flight(key, caller.max_concurrent)
        counting = []
        for shared_by, limit in limits:
            if limit.max_concurrent is not None:
                self._check_in_flight(shared_by, limit.max_concurrent)
            if limit.requests_per_min is not None:
                window = self._count(shared_by, now_s).requests
                _check_room(
                    window, now_s, num_requests, limit.requests_per_min, "requests", shared_by
                )
                counting.append(window)
        for window in counting:
            window.take(now_s, num_requests)
        turn = Turn((project, key))
        self._num_in_flight.update(turn.sharers)
        return turn

    def reserve(self, turn: Turn, num_tokens: int, limits: Iterable[tuple[str, Limit]]) -> None:
        """Count the most tokens that a request may take, until it is known how many it took.

        Raises:
            RateLimited: The tokens of a minute would be overdrawn.
            RequestOverLimit: They would be by this request alone.
        """
        now_s = self._monotonic()
        self._correct(turn, 0)
        counting = []
        for shared_by, limit in limits:
            if limit.tokens_per_min is None:
                continue
            if num_tokens > limit.tokens_per_min:
                raise RequestOverLimit(
                    needed=num_tokens, shared_by=shared_by, limit=limit.tokens_per_min
                )
            window = self._count(shared_by, now_s).tokens
            _check_room(window, now_s, num_tokens, limit.tokens_per_min, "tokens", shared_by)
            counting.append(window)
        turn.tokens = [(window, window.take(now_s, num_tokens)) for window in counting]

    def leave(self, turn: Turn, num_tokens: int = 0) -> None:
        """End a request that took so many tokens. Said again it changes nothing."""
        self._correct(turn, num_tokens)
        for sharer in turn.sharers:
            self._num_in_flight[sharer] -= 1
            if not self._num_in_flight[sharer]:
                del self._num_in_flight[sharer]
        turn.sharers = ()

    def standing(self, limits: Iterable[tuple[str, Limit]]) -> list[Standing]:
        """Return what is left of requests and of tokens: of the limit that is closest."""
        now_s = self._monotonic()
        found: dict[str, Standing] = {}
        for shared_by, limit in limits:
            count = self._counts.get(shared_by) or _Count()
            count.expire(now_s)
            for what, most, window in (
                ("requests", limit.requests_per_min, count.requests),
                ("tokens", limit.tokens_per_min, count.tokens),
            ):
                if most is None:
                    continue
                one = Standing(
                    what=what,
                    limit=most,
                    remaining=max(0, most - window.taken),
                    reset_s=window.reset_s(now_s),
                )
                if what not in found or one.remaining < found[what].remaining:
                    found[what] = one
        return list(found.values())

    def _check_in_flight(self, sharer: str, limit: int) -> None:
        if self._num_in_flight[sharer] >= limit:
            raise TooManyRequests(limit=limit, retry_after_s=RETRY_AFTER_S, shared_by=sharer)

    def _count(self, shared_by: str, now_s: float) -> _Count:
        if shared_by not in self._counts:
            if len(self._counts) >= MAX_COUNTS:
                self._forget_idle(now_s)
            self._counts[shared_by] = _Count()
        count = self._counts[shared_by]
        count.expire(now_s)
        return count

    def _forget_idle(self, now_s: float) -> None:
        for count in self._counts.values():
            count.expire(now_s)
        self._counts = {who: count for who, count in self._counts.items() if count.is_used}

    @staticmethod
    def _correct(turn: Turn, num_tokens: int) -> None:
        for window, entry in turn.tokens:
            window.correct(entry, num_tokens)
        turn.tokens = []


def _check_room(
    window: Window, now_s: float, amount: int, limit: int, what: str, shared_by: str
) -> None:
    if window.taken + amount > limit:
        wait_s = window.wait_s(now_s, amount, limit)
        raise RateLimited(what=what, shared_by=shared_by, limit=limit, retry_after_s=wait_s)
