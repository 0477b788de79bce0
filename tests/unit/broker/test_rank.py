"""The choice among many: the same as for few, and what it weighs beyond queue and speed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fabric.broker.cost import cost_s, lasting, passing, seconds_per_su
from fabric.broker.facts import Context, Offer, ReplicaSnapshot
from fabric.broker.lengths import MIN_ANSWERS, Lengths
from fabric.broker.pool import Pool
from fabric.broker.rank import Ranking
from fabric.broker.replicas import Fleet
from fabric.broker.select import decide, select
from fabric.broker.settings import BrokerSettings
from fabric.errors import NoReplica
from fabric.messages import (
    Hello,
    InstanceState,
    Limits,
    Load,
    Request,
    Sampling,
    TextInput,
    TokensInput,
)
from fabric.testing import choices
from fabric.testing.choices import DIGEST, offer

LONG = "You are a careful assistant. " * 60
SITES = tuple(f"s{number}" for number in range(8))


def replica(instance: str, site: str = "s0", **changes: Any) -> ReplicaSnapshot:
    return choices.replica(instance, site, **changes)


def context(*offers: Offer, explore: float = 0.0, **changes: Any) -> Context:
    changes.setdefault("settings", BrokerSettings(explore=explore))
    return choices.context(*(offers or map(offer, SITES)), **changes)


def request(number: int = 1, **changes: Any) -> Request:
    return choices.request(id=f"run_{number}", **changes)


def draw_replica(drawn: random.Random, number: int) -> ReplicaSnapshot:
    state = drawn.choices([InstanceState.READY, InstanceState.LOST], [9, 1])[0]
    return replica(
        f"inst_{number}",
        drawn.choice(SITES),
        digest=drawn.choice([DIGEST, DIGEST, "sha256:bb"]),
        state=state,
        ejected=drawn.random() < 0.1,
        max_rows=drawn.choice([1, 4, 16]),
        num_busy=drawn.randrange(40),
        num_in_flight=drawn.randrange(9),
        overhead_s=drawn.random(),
        prefill_tokens_per_s=drawn.choice([0.0, 500.0, 9000.0]),
        decode_tokens_per_s=drawn.choice([0.0, 5.0, 90.0]),
        failures=drawn.choice([0.0, 2.5]),
        ends_in_s=drawn.choice([None, 5.0, 500.0]),
        correction=drawn.uniform(0.5, 2.0),
        cold_p=drawn.choice([0.0, 0.0, 0.3]),
        start_wait_s=20.0,
        load_s=5.0,
        modes=drawn.choice([("query",), ("query", "embed"), ("embed",)]),
    )


def usually(length_s: float) -> Lengths:
    lengths = Lengths()
    for _ in range(MIN_ANSWERS):
        lengths.came(DIGEST, length_s)
    return lengths


@pytest.mark.parametrize("seed", range(12))
def test_the_ranking_of_all_is_the_formula_of_each(seed: int) -> None:
    drawn = random.Random(seed)
    found = [draw_replica(drawn, number) for number in range(120)]
    asked = request(
        input=TokensInput(ids=(1,) * drawn.choice([3, 1000])),
        sampling=Sampling(max_tokens=drawn.choice([1, 64, 1048]), n=drawn.choice([1, 1, 2])),
        policy=drawn.choice(["balanced", "fastest", "cheapest"]),
        data_site=drawn.choice(SITES),
        data_bytes=drawn.randrange(10**10),
        sites=drawn.choice([None, SITES[:3]]),
    )
    means = context(
        *(offer(site, scarcity=drawn.uniform(1, 50)) for site in SITES[:-1]),
        remaining_s=drawn.choice([2.0, 20.0, 300.0]),
        tried=frozenset({"inst_7", "gone"}),
        own={SITES[0]: True, SITES[1]: False},
        kept_by=drawn.choice([(), (), SITES[:1]]),
        lengths=drawn.choice([None, usually(2.0), usually(30.0)]),
    )
    expected = {
        one.instance: sum(cost_s(asked, one, means).values())
        for one in found
        if lasting(asked, one, means) is None and passing(one) is None
    }
    if not expected:
        with pytest.raises(NoReplica):
            decide(asked, found, means)
        return
    pool = Pool(found)
    ranking = Ranking(asked, pool, means)
    for instance, cost in expected.items():
        row = pool.row(instance)
        assert row is not None
        assert ranking.cost_N[row] == pytest.approx(cost, abs=1e-4)
    chosen = decide(asked, pool, means).chosen.instance
    assert expected[chosen] <= min(expected.values()) + means.settings.tie_s + 1e-4


def test_equal_replicas_of_a_large_fleet_share_the_requests() -> None:
    pool = Pool(replica(f"inst_{number}") for number in range(200))
    chosen = Counter(decide(request(n), pool, context()).chosen.instance for n in range(1000))
    assert len(chosen) > 180
    assert max(chosen.values()) < 20


def test_replicas_come_and_go_and_the_choice_is_as_if_they_had_always_been_there() -> None:
    drawn = random.Random(3)
    pool, there = Pool(), {}
    for step in range(600):
        number = drawn.randrange(60)
        name = f"inst_{number}"
        if name in there and drawn.random() < 0.4:
            pool.drop(name)
            del there[name]
        else:
            there[name] = draw_replica(drawn, number)
            pool.put(there[name])
        if step % 20 == 0 and there:
            asked, means = request(step), context()
            kept, fresh = Ranking(asked, pool, means), Ranking(asked, Pool(there.values()), means)
            names = {
                pool.snapshots[row].instance: cost for row, cost in enumerate(kept.cost_N.tolist())
            }
            again = dict(zip(there, fresh.cost_N.tolist(), strict=True))
            assert names == pytest.approx(again)


def test_a_large_fleet_is_told_of_by_site_and_in_full_when_asked() -> None:
    found = [
        replica(f"inst_{n}", SITES[n % 4], num_busy=n % 16, ejected=n % 10 == 0) for n in range(400)
    ]
    decision = decide(request(), found, context())
    short, whole = decision.placement(), decision.placement(whole=True)
    assert len(whole.candidates) == 400
    assert len(short.candidates) <= 8
    assert sum(one.num_alike for one in short.candidates) == 400
    assert {one.site for one in short.candidates} == set(SITES[:4])
    assert short.instance == whole.instance
    assert short.instance in {one.instance for one in short.candidates}


def test_a_refusal_by_a_large_fleet_stays_readable() -> None:
    found = [replica(f"inst_{n}", SITES[n % 2], state=InstanceState.LOST) for n in range(300)]
    with pytest.raises(NoReplica) as refused:
        decide(request(), found, context())
    reasons = refused.value.detail["reasons"]
    assert isinstance(reasons, dict)
    assert set(reasons) == {"inst_0 and 149 more at s0", "inst_1 and 149 more at s1"}


# ---- what it weighs -----------------------------------------------------------------------------


def test_a_replica_that_must_be_started_costs_its_start() -> None:
    cold = replica("cold", "s0", cold_p=0.5, start_wait_s=60.0, load_s=20.0)
    busy = replica("busy", "s1", num_busy=16)
    placement = select(request(), (cold, busy), context())
    assert placement.instance == "busy"
    assert placement.reason.startswith("s1: it is running; ")
    assert placement.candidates[0].cost_s["cold"] == 40.0
    assert "cold" not in placement.candidates[1].cost_s
    full = replace(busy, num_busy=1600)
    assert select(request(), (cold, full), context()).instance == "cold"
    with pytest.raises(NoReplica, match="its first token is expected"):
        select(request(), (cold,), context(remaining_s=10.0))


def test_the_link_between_two_sites_decides_where_data_goes() -> None:
    settings = BrokerSettings(explore=0.0, bandwidths_bytes_per_s={"s9": {"s1": 10e9}})
    found = (replica("a", "s0"), replica("b", "s1"))
    asked = request(data_site="s9", data_bytes=10**10)
    assert select(asked, found, context(settings=settings)).instance == "b"


def test_what_was_slower_than_predicted_costs_more_and_says_so() -> None:
    found = (replica("a", "s0", correction=1.5), replica("b", "s1"))
    placement = select(request(), found, context())
    assert placement.instance == "b"
    assert placement.candidates[0].correction == 1.5
    assert placement.candidates[0].cost_s["service"] == pytest.approx(
        1.5 * placement.candidates[1].cost_s["service"], abs=1e-5
    )


def test_a_balance_that_will_not_last_is_dear_and_one_that_lapses_is_cheap() -> None:
    lasts = offer("s0", burn_usu_per_day=50_000.0, days_left=10.0)
    runs_out = offer("s1", burn_usu_per_day=500_000.0, days_left=10.0)
    idle = offer("s2", burn_usu_per_day=0.0, days_left=10.0)
    assert [one.pressure for one in (lasts, runs_out, idle)] == [0.5, 5.0, 0.1]
    assert offer("s3", scarcity=7.0).pressure == 7.0
    found = (replica("a", "s0"), replica("b", "s1"))
    assert select(request(), found, context(lasts, runs_out)).instance == "a"


def placed(num_tokens: int, *, fast_usu: int, fast_tokens_per_s: float) -> str:
    """Return where a request goes whose answer has so many tokens: ``fast`` charges more for one,
    and ``slow`` a micro-SU; usual are 90 tokens."""
    found = (
        replica("fast", "s0", decode_tokens_per_s=fast_tokens_per_s),
        replica("slow", "s1", decode_tokens_per_s=30.0),
    )
    means = context(
        offer("s0", expected_charge_usu=num_tokens * fast_usu),
        offer("s1", expected_charge_usu=num_tokens),
        settings=BrokerSettings(explore=0.0, tie_s=0.0),
        lengths=usually(3.0),
    )
    asked = request(sampling=Sampling(max_tokens=num_tokens))
    return select(asked, found, means).instance


@given(
    num_tokens=st.tuples(st.integers(1, 128), st.integers(1, 128)),
    fast_usu=st.integers(1, 200),
    fast_tokens_per_s=st.floats(31.0, 500.0),
)
def test_the_longer_request_goes_to_the_faster_site_first(
    num_tokens: tuple[int, int], fast_usu: int, fast_tokens_per_s: float
) -> None:
    short, long = (
        placed(number, fast_usu=fast_usu, fast_tokens_per_s=fast_tokens_per_s)
        for number in sorted(num_tokens)
    )
    assert (short, long) != ("fast", "slow")


def test_at_the_same_price_of_a_token_a_long_request_buys_speed_and_a_short_one_does_not() -> None:
    where = [placed(number, fast_usu=30, fast_tokens_per_s=60.0) for number in (20, 90, 128)]
    assert where == ["slow", "fast", "fast"]
    where = [placed(number, fast_usu=40, fast_tokens_per_s=60.0) for number in (20, 90, 128)]
    assert where == ["slow", "slow", "fast"]


@pytest.mark.parametrize(
    ("tokens", "divided_by"),
    [((0, 0), 0.5), ((1, 1), 0.5), ((0, 90), 1.0), ((10**12, 10**12), 3.0)],
)
def test_what_a_unit_is_worth_stays_within_its_bounds(
    tokens: tuple[int, int], divided_by: float
) -> None:
    worth_s = seconds_per_su(tokens, context(lengths=usually(3.0)))
    assert worth_s == pytest.approx(BrokerSettings().seconds_per_su / divided_by)


def test_where_no_length_is_usual_yet_a_unit_is_worth_the_same_to_all() -> None:
    known_elsewhere = context(digest="sha256:bb", lengths=usually(3.0))
    for means in (context(), context(lengths=Lengths()), known_elsewhere):
        assert seconds_per_su((10, 1000), means) == means.settings.seconds_per_su


def test_requests_that_begin_alike_go_to_the_same_few_replicas() -> None:
    pool = Pool(replica(f"inst_{n}", caches_prefixes=True) for n in range(50))
    chosen = Counter(
        decide(
            request(n, input=TextInput(text=f"{LONG} And now number {n}.")), pool, context()
        ).chosen.instance
        for n in range(60)
    )
    assert len(chosen) <= 2
    homes = {
        decide(request(input=TextInput(text=f"{n} {LONG}")), pool, context()).chosen.instance
        for n in range(60)
    }
    assert len(homes) > 20


def test_a_busy_replica_does_not_keep_what_begins_alike() -> None:
    pool = Pool(replica(f"inst_{n}", caches_prefixes=True) for n in range(9))
    asked = request(input=TextInput(text=LONG))
    first = decide(asked, pool, context()).chosen
    pool.put(replace(first, num_busy=64))
    assert decide(asked, pool, context()).chosen.instance != first.instance


def test_nothing_is_saved_where_no_beginning_is_kept() -> None:
    pool = Pool(replica(f"inst_{n}") for n in range(50))
    asked = [request(n, input=TextInput(text=f"{LONG} {n}")) for n in range(60)]
    assert len({decide(one, pool, context()).chosen.instance for one in asked}) > 20


# ---- trials -------------------------------------------------------------------------------------


FAST_AND_SLOW = (
    replica("fast", "s0", decode_tokens_per_s=60.0),
    replica("slow", "s1", decode_tokens_per_s=30.0),
)


def _trials(means: Context, **changes: Any) -> list[str]:
    decisions = (decide(request(n, **changes), FAST_AND_SLOW, means) for n in range(3000))
    return [one.placement().reason for one in decisions if one.is_trial]


def test_a_few_requests_try_another_replica_and_the_same_ones_again() -> None:
    reasons = _trials(context(explore=0.02))
    assert 20 < len(reasons) < 70
    assert set(reasons) == {"s1: it is tried out, to know how fast it is"}
    assert _trials(context(explore=0.02)) == reasons
    assert not _trials(context())


def test_a_trial_never_endangers_the_deadline_or_leaves_the_data() -> None:
    assert not _trials(context(explore=0.02, remaining_s=2.0))
    assert not _trials(context(explore=0.02), data_site="s0")
    assert not _trials(context(explore=0.02), data_site="s0", policy="local-only")
    assert not _trials(context(explore=0.02, tried=frozenset({"other"})))


# ---- policies -----------------------------------------------------------------------------------


def test_own_weights_replace_those_of_the_policy() -> None:
    dear_and_fast = context(offer("s0", expected_charge_usu=9_000), offer("s1"))
    assert select(request(), FAST_AND_SLOW, dear_and_fast).instance == "slow"
    careless = request(weights={"price": 0.0})
    assert select(careless, FAST_AND_SLOW, dear_and_fast).instance == "fast"


@pytest.mark.parametrize(
    "weights", [{"price": -1.0}, {"price": 101.0}, {"colour": 1.0}, {"price": float("nan")}, [1]]
)
def test_weights_that_mean_nothing_are_refused(weights: Any) -> None:
    with pytest.raises(ValidationError):
        request(weights=weights)


# ---- the fleet ----------------------------------------------------------------------------------


def test_the_fleet_keeps_its_columns_as_its_replicas_are() -> None:
    drawn = random.Random(5)
    fleet = Fleet(BrokerSettings(eject_after=2, eject_s=5.0, lost_memory_s=20.0))
    now = 0.0
    names = [f"inst_{number}" for number in range(12)]
    for step in range(1500):
        now += drawn.expovariate(2.0)
        name = drawn.choice(names)
        match drawn.randrange(9):
            case 0:
                hello = _hello(name, drawn.choice([None, 30.0]))
                fleet.join(now, hello, streams=True, joined_at=0.0)
            case 1:
                fleet.leave(now, name, lost=drawn.random() < 0.5)
            case 2:
                fleet.report(name, Load(num_running=drawn.randrange(9)), draining=False)
            case 3 | 4 if fleet.get(name) is not None:
                fleet.assign(now, name, f"run_{step}")
            case 5 if (found := fleet.get(name)) is not None and found.in_flight:
                fleet.release(name, min(found.in_flight))
            case 6:
                fleet.failed(now, name)
            case 7:
                fleet.observed(
                    now,
                    name,
                    prompt_tokens=drawn.choice([9, 900]),
                    first_token_s=drawn.random(),
                    decode_tokens_per_s=drawn.uniform(1, 90),
                    ratio=drawn.uniform(0.2, 9.0),
                )
            case _:
                fleet.tick(now)
        pool, fresh = fleet.pool(now), {one.instance: one for one in fleet.snapshots(now)}
        assert {one.instance for one in pool.snapshots} == set(fresh)
        for instance, expected in fresh.items():
            row = pool.row(instance)
            assert row is not None
            kept = replace(pool.at(row), ends_in_s=None)
            assert kept.failures == pytest.approx(expected.failures, abs=0.2)
            assert replace(kept, failures=0.0) == replace(expected, failures=0.0, ends_in_s=None)
            if expected.ends_in_s is not None:
                assert pool.at(row).ends_in_s == pytest.approx(expected.ends_in_s)


def _hello(instance: str, deadline_s: float | None) -> Hello:
    return Hello(
        instance=instance,
        site="s0",
        model="smol@1",
        digest=DIGEST,
        limits=Limits(context_tokens=2048, max_rows=16, cache_tokens=10**6),
        dtype="float32",
        engine="none",
        deadline_s=deadline_s,
    )
