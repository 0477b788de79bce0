"""Weighted fair queueing: whose turn it is when there is less room than work. Pure, no clock.

Each key has a virtual counter of what it was given, divided by its weight; the lowest is next. A
key that comes back is lifted to the lowest of those that wait, so that nobody saves up turns.

Source: the Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models"
(arXiv 2401.00588), charged in device-seconds: as predicted when a turn is taken, and set right when
it is known. With exact predictions the counters of those that wait never differ by more than the
largest single charge.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from fabric.broker.tiers import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """Something that waits for its turn.

    Args:
        item: Its name.
        project: Who pays, and
        weight: how much of the whole is theirs, relative to other projects.
        tier: What kind of work it is, and
        tier_weight: how much of the project's share goes to that; 0 is work for idle capacity
            alone, where whose deadline is first goes first.
        lane: What it can wait for: who waits in one lane for one thing cannot pass each other.
        own: Whose rows it waits for, if nobody waits for them but who waits for the same.
        seconds: What it is expected to take.
        due_at: Its deadline.
    """

    item: str
    project: str
    tier: Tier
    lane: Hashable = None
    own: Hashable = None
    seconds: float
    due_at: float = 0.0
    weight: float = 1.0
    tier_weight: float = 1.0

    @property
    def spare(self) -> bool:
        """Whether it takes only what others leave."""
        return self.tier_weight == 0.0

    @property
    def place(self) -> Hashable:
        """Where it stands: of one place only the first can go."""
        return (None, self.lane) if self.spare else (self.project, self.tier, self.lane)


class Counters:
    """What each key was given, in seconds over its weight."""

    def __init__(self) -> None:
        self._spent_s: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._clock_s = 0.0
        """The counter of whoever had the last turn, before it."""

    def __getitem__(self, key: str) -> float:
        return self._spent_s.get(key, self._clock_s)

    def enter(self, key: str) -> None:
        """A key has something that waits."""
        if key in self._waiting:
            return
        lowest_s = min((self._spent_s[one] for one in self._waiting), default=self._clock_s)
        self._spent_s[key] = max(self._spent_s.get(key, lowest_s), lowest_s)
        self._waiting.add(key)

    def leave(self, key: str) -> None:
        """Nothing of the key waits any more; a counter that says nothing is forgotten."""
        self._waiting.discard(key)
        if self._spent_s.get(key, 0.0) <= self._clock_s:
            self._spent_s.pop(key, None)

    def take(self, key: str, seconds: float) -> None:
        """A key that waits has a turn that takes ``seconds`` of its share."""
        self._clock_s = max(self._clock_s, self._spent_s[key])
        self._spent_s[key] += seconds

    def correct(self, key: str, seconds: float) -> None:
        """A turn took so much more, or less, than it was charged."""
        self._spent_s[key] = self[key] + seconds
        if key not in self._waiting:
            self.leave(key)

    def in_turn(self) -> list[str]:
        """Return the keys that wait, the next one first."""
        return sorted(self._waiting, key=lambda key: (self._spent_s[key], key))

    def before(self, key: str, backlogs_s: dict[str, float], weights: dict[str, float]) -> float:
        """Return the seconds of the others that are expected to go before all that ``key`` has.

        Args:
            key: It need not wait yet.
            backlogs_s: What waits of each key, in seconds.
            weights: Of each key.
        """
        floor_s = min((self._spent_s[one] for one in self._waiting), default=self._clock_s)
        start_s = max(self[key], floor_s) + backlogs_s.get(key, 0.0) / weights[key]
        return sum(
            min(backlog_s, max(0.0, start_s - self[other]) * weights[other])
            for other, backlog_s in backlogs_s.items()
            if other != key
        )


_SLACK = 64
"""Entries of those who have left that a lane may keep."""
_Entry = tuple[float, int, str]
"""A deadline, or 0 where it does not count; a number in order of arrival; an item."""


@dataclass(slots=True)
class _Flow:
    """What waits of one project and tier, by lane; the heaps keep who has left until they come."""

    weight: float
    lanes: dict[Hashable, list[_Entry]] = field(default_factory=dict)
    backlog_s: float = 0.0
    num_waiting: int = 0


class FairQueue:
    """Who waits for one kind of thing: projects share it by weight, and their tiers their share."""

    def __init__(self) -> None:
        self._waiters: dict[str, Waiter] = {}
        self._number: dict[str, int] = {}
        """Which of the entries of a lane is an item's own: it may have left and come back."""
        self._flows: dict[str, dict[str, _Flow]] = {}
        self._spare = _Flow(weight=0.0)
        self._weights: dict[str, float] = {}
        self._projects = Counters()
        self._tiers: dict[str, Counters] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, item: str) -> bool:
        return item in self._waiters

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._waiters.values())

    @property
    def backlog_s(self) -> float:
        """What all that wait are expected to take, in seconds."""
        fair_s = sum(flow.backlog_s for flows in self._flows.values() for flow in flows.values())
        return fair_s + self._spare.backlog_s

    def add(self, waiter: Waiter) -> bool:
        """Take someone in, and return whether it is the first of its place."""
        flow = self._spare
        if not waiter.spare:
            flows = self._flows.setdefault(waiter.project, {})
            flow = flows.setdefault(waiter.tier, _Flow(weight=waiter.tier_weight))
            self._weights[waiter.project] = waiter.weight
            self._projects.enter(waiter.project)
            self._tiers.setdefault(waiter.project, Counters()).enter(waiter.tier)
        self._waiters[waiter.item] = waiter
        flow.backlog_s += waiter.seconds
        flow.num_waiting += 1
        lane = flow.lanes.setdefault(waiter.lane, [])
        rank = waiter.due_at if waiter.spare else 0.0
        number = self._number[waiter.item] = next(self._numbers)
        heappush(lane, (rank, number, waiter.item))
        return self._first(lane) == waiter.item

    def head(self, skipped: Container[Hashable] = ()) -> Waiter | None:
        """Return who is next, but for those of the ``skipped`` places."""
        return next((one for one in self._heads() if one.place not in skipped), None)

    def take(self, item: str, seconds: float) -> None:
        """It is an item's turn, which is expected to take ``seconds`` of what is shared."""
        waiter = self._waiters[item]
        if not waiter.spare:
            self._projects.take(waiter.project, seconds / waiter.weight)
            self._tiers[waiter.project].take(waiter.tier, seconds / waiter.tier_weight)
        self.drop(item)

    def correct(self, waiter: Waiter, seconds: float) -> None:
        """A turn that was taken took so many seconds more, or less, than expected."""
        if not waiter.spare:
            self._projects.correct(waiter.project, seconds / waiter.weight)
            if (tiers := self._tiers.get(waiter.project)) is not None:
                tiers.correct(waiter.tier, seconds / waiter.tier_weight)

    def drop(self, item: str) -> None:
        """Someone waits no longer."""
        waiter = self._waiters.pop(item)
        del self._number[item]
        flow = self._spare if waiter.spare else self._flows[waiter.project][waiter.tier]
        flow.num_waiting -= 1
        # Sums of floats that go up and down do not come back to zero by themselves.
        flow.backlog_s = max(0.0, flow.backlog_s - waiter.seconds) if flow.num_waiting else 0.0
        lane = flow.lanes[waiter.lane]
        if self._first(lane) is None:
            del flow.lanes[waiter.lane]
        elif len(lane) > 2 * flow.num_waiting + _SLACK:
            flow.lanes[waiter.lane] = sorted(filter(self._is_current, lane))
        if waiter.spare or flow.num_waiting:
            return
        project, flows = waiter.project, self._flows[waiter.project]
        del flows[waiter.tier]
        self._tiers[project].leave(waiter.tier)
        if not flows:
            del self._flows[project], self._tiers[project], self._weights[project]
            self._projects.leave(project)

    def before_s(self, waiter: Waiter) -> float:
        """Return the expected seconds of those that would go before a newcomer."""
        if waiter.own is not None:
            return sum(one.seconds for one in self if one.own == waiter.own)
        if waiter.spare:
            return sum(one.seconds for one in self if not one.spare or one.due_at <= waiter.due_at)
        flows = self._flows.get(waiter.project, {})
        own_s = 0.0
        if flows:
            backlogs_s = {tier: flow.backlog_s for tier, flow in flows.items()}
            weights = {tier: flow.weight for tier, flow in flows.items()}
            weights[waiter.tier] = waiter.tier_weight
            own_s = backlogs_s.get(waiter.tier, 0.0)
            own_s += self._tiers[waiter.project].before(waiter.tier, backlogs_s, weights)
        projects_s = {
            project: sum(flow.backlog_s for flow in mine.values())
            for project, mine in self._flows.items()
        }
        projects_s[waiter.project] = own_s
        shares = {**self._weights, waiter.project: waiter.weight}
        return own_s + self._projects.before(waiter.project, projects_s, shares)

    def _heads(self) -> Iterator[Waiter]:
        for project in self._projects.in_turn():
            flows = self._flows[project]
            for tier in self._tiers[project].in_turn():
                yield from self._firsts(flows[tier])
        yield from self._firsts(self._spare)

    def _firsts(self, flow: _Flow) -> Iterator[Waiter]:
        for lane in sorted(flow.lanes.values(), key=lambda lane: lane[0]):
            if (item := self._first(lane)) is not None:
                yield self._waiters[item]

    def _first(self, lane: list[_Entry]) -> str | None:
        """Return the first of a lane, and forget those before it that have left."""
        while lane and not self._is_current(lane[0]):
            heappop(lane)
        return lane[0][2] if lane else None

    def _is_current(self, entry: _Entry) -> bool:
        return self._number.get(entry[2]) == entry[1]
