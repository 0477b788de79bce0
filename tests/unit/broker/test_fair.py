"""Fair queueing keeps its promises, whoever asks for what in whatever order."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.broker.fair import FairQueue, Waiter

LARGEST_S = 8.0
SMALLEST_WEIGHT = 0.5
NUMBERS = count()

weights = st.sampled_from([0.5, 1.0, 2.0, 4.0])
seconds = st.floats(min_value=0.1, max_value=LARGEST_S)


def add(queue: FairQueue, project: str, needs_s: float = 1.0, **changes: Any) -> str:
    fields: dict[str, Any] = {"tier": "standard", "seconds": needs_s, **changes}
    item = f"{project}-{next(NUMBERS)}"
    queue.add(Waiter(item=item, project=project, **fields))
    return item


def serve(queue: FairQueue) -> Waiter:
    head = queue.head()
    assert head is not None
    queue.take(head.item, head.seconds)
    return head


@given(
    st.dictionaries(st.sampled_from("abcd"), weights, min_size=2),
    st.lists(st.tuples(st.sampled_from("abcd"), seconds), min_size=30, max_size=80),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_backlogged_projects_differ_by_no_more_than_the_largest_request(
    shares: dict[str, float], asked: list[tuple[str, float]], data: st.DataObject
) -> None:
    queue, waiting, given_s = FairQueue(), defaultdict(int), defaultdict(float)
    for project, needs_s in asked:
        if project in shares:
            add(queue, project, needs_s, weight=shares[project])
            waiting[project] += 1
    everyone = set(waiting)
    largest_s = max((s / shares[p] for p, s in asked if p in shares), default=0.0)
    while everyone and all(waiting[project] for project in everyone):
        head = serve(queue)
        waiting[head.project] -= 1
        given_s[head.project] += head.seconds / head.weight
        spread_s = max(given_s[p] for p in everyone) - min(given_s[p] for p in everyone)
        assert spread_s <= largest_s + 1e-9


@given(
    st.lists(st.tuples(st.sampled_from("abc"), seconds, st.booleans()), min_size=10, max_size=120)
)
@settings(max_examples=60, deadline=None)
def test_nobody_starves_however_much_the_others_keep_asking(
    asked: list[tuple[str, float, bool]],
) -> None:
    queue = FairQueue()
    victim = add(queue, "victim", LARGEST_S, weight=SMALLEST_WEIGHT, tier="interactive")
    others_s = 0.0
    for project, needs_s, is_heavy in asked:
        # Each of the others always has something more, with up to eight times the weight.
        for other in "abc":
            add(queue, other, needs_s, weight=4.0 if is_heavy else 1.0, tier=project)
        head = serve(queue)
        if head.item == victim:
            return
        others_s += head.seconds
        assert others_s <= 3 * (4.0 * LARGEST_S + LARGEST_S)


@given(st.integers(min_value=1, max_value=40), seconds)
@settings(max_examples=40, deadline=None)
def test_a_project_that_comes_back_does_not_reclaim_the_past(
    num_before: int, needs_s: float
) -> None:
    queue = FairQueue()
    add(queue, "idle", needs_s)
    for _ in range(num_before + 41):
        add(queue, "busy", needs_s)
    while "idle" in {one.project for one in queue}:
        serve(queue)
    for _ in range(num_before):
        serve(queue)
    for _ in range(20):
        add(queue, "idle", needs_s)
    served = [serve(queue).project for _ in range(10)]
    assert 4 <= served.count("idle") <= 6


def test_the_tiers_of_a_project_share_what_is_the_projects() -> None:
    queue = FairQueue()
    for _ in range(40):
        add(queue, "greedy", tier="interactive", tier_weight=4.0)
        add(queue, "greedy", tier="standard", tier_weight=2.0)
        add(queue, "greedy", tier="introspection", tier_weight=1.0)
        add(queue, "modest", tier="standard", tier_weight=2.0)
    served = [serve(queue) for _ in range(42)]
    assert 20 <= sum(one.project == "modest" for one in served) <= 22
    greedy = [one.tier for one in served if one.project == "greedy"]
    assert greedy.count("interactive") in (11, 12, 13)
    assert greedy.count("introspection") in (2, 3, 4)


def test_batch_work_goes_last_and_by_its_deadline() -> None:
    queue = FairQueue()
    late = add(queue, "a", tier="batch", tier_weight=0.0, due_at=200.0)
    soon = add(queue, "b", tier="batch", tier_weight=0.0, due_at=100.0)
    latest = add(queue, "a", tier="batch", tier_weight=0.0, due_at=300.0)
    other = add(queue, "c")
    assert [serve(queue).item for _ in range(4)] == [other, soon, late, latest]
    assert queue.head() is None


def test_what_a_turn_really_took_decides_who_is_next() -> None:
    queue = FairQueue()
    for _ in range(20):
        add(queue, "honest"), add(queue, "lucky")
    turns = [serve(queue) for _ in range(4)]
    for turn in turns:
        if turn.project == "lucky":  # it was charged 1 s and took a tenth of one
            queue.correct(turn, -0.9)
    assert [serve(queue).project for _ in range(2)] == ["lucky", "lucky"]


def test_one_who_cannot_go_holds_up_its_own_lane_alone() -> None:
    queue = FairQueue()
    first = add(queue, "a", lane="alpha")
    behind = add(queue, "a", lane="alpha")
    other = add(queue, "a", lane="beta")
    head = queue.head()
    assert head is not None
    assert head.item == first
    next_one = queue.head({head.place})
    assert next_one is not None
    assert next_one.item == other
    assert behind in queue


def test_one_who_leaves_and_comes_back_stands_at_the_end() -> None:
    queue = FairQueue()
    first, second = add(queue, "a"), add(queue, "a")
    queue.drop(first)
    queue.add(Waiter(item=first, project="a", tier="standard", seconds=1.0))
    assert [serve(queue).item, serve(queue).item] == [second, first]
    assert (len(queue), queue.backlog_s) == (0, 0.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), seconds), max_size=40), weights, seconds)
@settings(max_examples=80, deadline=None)
def test_the_wait_that_is_foretold_is_the_wait_that_comes(
    asked: list[tuple[str, float]], weight: float, needs_s: float
) -> None:
    queue = FairQueue()
    for project, project_s in asked:
        add(queue, project, project_s, weight={"a": 1.0, "b": 2.0, "c": weight}[project])
    mine = Waiter(item="mine", project="b", tier="standard", seconds=needs_s, weight=2.0)
    foretold_s = queue.before_s(mine)
    queue.add(mine)
    came_s = 0.0
    while (head := serve(queue)).item != "mine":
        came_s += head.seconds
    # A turn is not divided, so each project may be one request ahead or behind, times its weight.
    assert foretold_s == pytest.approx(came_s, abs=3 * LARGEST_S * max(2.0, weight / 0.5))


def test_ten_thousand_who_leave_take_no_room() -> None:
    queue = FairQueue()
    first = add(queue, "a")
    for _ in range(10_000):
        queue.drop(add(queue, "a"))
    [lane] = queue._flows["a"]["standard"].lanes.values()
    assert len(lane) < 100
    assert serve(queue).item == first
