"""Limits of requests, tokens and concurrency: no minute and no moment has more than they say."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.auth import Grants, Identity, Limit
from fabric.broker import Broker, Run
from fabric.broker.limits import PERIOD_S, Limiter, Turn
from fabric.errors import RateLimited, RequestOverLimit, TooManyRequests
from fabric.testing.runs import Ask

ME = Identity(key_id="k1", project="astro", scopes=frozenset({"query"}), max_concurrent=10**6)
YOU = Identity(key_id="k2", project="astro", scopes=frozenset({"query"}), max_concurrent=10**6)


class Time:
    """Seconds that only grow when told to."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def limits_of(caller: Identity, **bounds: int) -> list[tuple[str, Limit]]:
    """Return one limit for the caller's key, and twice as much for the project."""
    project = {name: 2 * value for name, value in bounds.items()}
    return [
        (f"key:{caller.key_id}", Limit(subject="key:*", **bounds)),
        ("project:astro", Limit(subject="project:astro", **project)),
    ]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end", "wait"]),
        st.sampled_from([ME, YOU]),
        st.integers(1, 60),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS, st.integers(1, 6), st.integers(1, 80), st.integers(1, 4))
def test_no_minute_and_no_moment_has_more_than_its_limit(
    steps: list[tuple[str, Identity, int]], requests: int, tokens: int, concurrent: int
) -> None:
    """Every admission is compared with a plain list of all that happened."""
    time = Time()
    limiter = Limiter(monotonic=time)
    bounds = {
        "requests_per_min": requests,
        "tokens_per_min": tokens,
        "max_concurrent": concurrent,
    }
    entered: list[tuple[float, str]] = []
    spent: list[list[Any]] = []
    running: list[tuple[str, Turn, list[Any] | None]] = []

    def recent(entries: list[Any]) -> list[Any]:
        return [one for one in entries if one[0] > time.now_s - PERIOD_S]

    for act, caller, amount in steps:
        if act == "wait":
            time.now_s += amount
        elif act == "end" and running:
            _, turn, entry = running.pop(0)
            used = amount // 2
            limiter.leave(turn, used)
            if entry is not None:
                entry[2] = min(entry[2], used)
        elif act == "ask":
            limits = limits_of(caller, **bounds)
            for who, factor in ((caller.key_id, 1), ("", 2)):
                mine = [one for one in recent(entered) if who in ("", one[1])]
                assert len(mine) <= factor * requests
            fits = all(
                sum(who in ("", key) for key, _, _ in running) < factor * concurrent
                and sum(who in ("", key) for _, key in recent(entered)) < factor * requests
                for who, factor in ((caller.key_id, 1), ("", 2))
            )
            try:
                turn = limiter.enter(caller, limits)
            except TooManyRequests:
                assert not fits
                continue
            assert fits
            entered.append((time.now_s, caller.key_id))
            taken = {
                who: sum(n for _, key, n in recent(spent) if who in ("", key))
                for who in (caller.key_id, "")
            }
            room = taken[caller.key_id] + amount <= tokens and taken[""] + amount <= 2 * tokens
            try:
                limiter.reserve(turn, amount, limits)
            except RequestOverLimit:
                assert amount > tokens
                limiter.leave(turn)
            except RateLimited:
                assert not room
                limiter.leave(turn)
            else:
                assert room
                entry = [time.now_s, caller.key_id, amount]
                spent.append(entry)
                running.append((caller.key_id, turn, entry))


def test_the_time_to_wait_is_exactly_enough() -> None:
    time = Time()
    limiter = Limiter(monotonic=time)
    limits = limits_of(ME, requests_per_min=3)
    for _ in range(3):
        limiter.enter(ME, limits)
        time.now_s += 7.0
    with pytest.raises(RateLimited) as refused:
        limiter.enter(ME, limits)
    wait_s = refused.value.detail["retry_after_s"]
    assert wait_s == PERIOD_S - 21.0
    time.now_s += 38.5
    with pytest.raises(RateLimited):
        limiter.enter(ME, limits)
    time.now_s += 0.5
    limiter.enter(ME, limits)


def test_tokens_that_were_not_used_come_back_at_once() -> None:
    time = Time()
    limiter = Limiter(monotonic=time)
    limits = limits_of(ME, tokens_per_min=100)
    turn = limiter.enter(ME, limits)
    limiter.reserve(turn, 90, limits)
    other = limiter.enter(ME, limits)
    with pytest.raises(RateLimited, match="100 tokens a minute"):
        limiter.reserve(other, 20, limits)
    limiter.leave(turn, 30)
    limiter.reserve(other, 70, limits)
    assert [(one.what, one.limit, one.remaining) for one in limiter.standing(limits)] == [
        ("tokens", 100, 0)
    ]


def test_a_request_that_could_never_fit_is_not_told_to_wait() -> None:
    limiter = Limiter()
    limits = limits_of(ME, tokens_per_min=100)
    turn = limiter.enter(ME, limits)
    with pytest.raises(RequestOverLimit) as refused:
        limiter.reserve(turn, 101, limits)
    assert not refused.value.retryable


def test_one_that_is_refused_by_the_project_counts_for_nobody() -> None:
    limiter = Limiter()
    project = ("project:astro", Limit(subject="project:astro", requests_per_min=1))
    mine = ("key:k1", Limit(subject="key:*", requests_per_min=5))
    limiter.enter(YOU, [project])
    for _ in range(3):
        with pytest.raises(RateLimited, match="project:astro"):
            limiter.enter(ME, [mine, project])
    assert {one.what: one.remaining for one in limiter.standing([mine])} == {"requests": 5}


def test_callers_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric.broker.limits.MAX_COUNTS", 10)
    time = Time()
    limiter = Limiter(monotonic=time)
    for number in range(100):
        limit = Limit(subject="key:*", requests_per_min=1)
        limiter.leave(limiter.enter(ME, [(f"key:{number}", limit)]))
        time.now_s += PERIOD_S
    assert len(limiter._counts) <= 10


async def test_a_thousand_tasks_at_once_overshoot_no_limit() -> None:
    limiter, rng = Limiter(), random.Random(7)
    limits = limits_of(ME, max_concurrent=8, requests_per_min=300, tokens_per_min=5_000)
    inside: Counter[str] = Counter()
    admitted, reserved, seen = 0, 0, 0

    async def ask(caller: Identity, pause_s: float) -> None:
        nonlocal admitted, reserved, seen
        await asyncio.sleep(pause_s)
        turn = limiter.enter(caller, limits)
        admitted += 1
        inside[caller.key_id] += 1
        seen = max(seen, inside[caller.key_id])
        try:
            limiter.reserve(turn, 50, limits)
            reserved += 50
            await asyncio.sleep(pause_s)
        finally:
            inside[caller.key_id] -= 1
            limiter.leave(turn, 50)

    async def try_to(caller: Identity) -> None:
        with suppress(RateLimited):
            while True:
                try:
                    return await ask(caller, rng.random() / 100)
                except RateLimited:
                    raise
                except TooManyRequests:
                    continue

    await asyncio.gather(*(try_to(ME) for _ in range(1000)))
    assert seen <= 8
    assert admitted <= 300
    assert reserved <= 5_000
    # Not for want of trying: one more would have been too many.
    assert reserved == 5_000
    assert admitted >= 100
    assert not limiter._num_in_flight


# ---- in the broker -------------------------------------------------------------------------------


@pytest.fixture
def grants(hub: Any) -> Grants:
    hub.grant()
    return Grants(hub.database)


async def test_the_broker_counts_by_project_and_gives_back_what_was_not_used(
    hub: Any, grants: Grants, caller: Identity, ask: Ask, read: Any
) -> None:
    grants.set_limit("project:*", max_concurrent=3)
    broker: Broker = await hub.broker()
    broker.attach(hub.channel("alpha", first_token_s=0.1))
    others = [
        Identity(key_id=f"k{n}", project="astro", scopes=caller.scopes, max_concurrent=64)
        for n in range(10)
    ]
    outcomes = await asyncio.gather(
        *(broker.submit(one, ask()) for one in others), return_exceptions=True
    )
    runs = [one for one in outcomes if isinstance(one, Run)]
    assert len(runs) == 3
    assert {type(one) for one in outcomes} == {Run, TooManyRequests}
    for run in runs:
        await read(run)
    await read(await broker.submit(caller, ask()))


async def test_tokens_of_a_refused_request_come_back(
    hub: Any, grants: Grants, caller: Identity, ask: Ask, read: Any
) -> None:
    grants.set_limit("key:*", tokens_per_min=100, requests_per_min=100)
    broker: Broker = await hub.broker()
    broker.attach(hub.channel("alpha"))
    with pytest.raises(RequestOverLimit):
        await broker.submit(caller, ask(max_tokens=200))
    for _ in range(3):
        await read(await broker.submit(caller, ask(max_tokens=20)))
    used = {one.what: one.limit - one.remaining for one in broker.standing(caller)}
    # Three words and twenty tokens each; nothing of what was refused.
    assert used == {"requests": 4, "tokens": 3 * (3 + 20)}
