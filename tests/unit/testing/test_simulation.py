"""A small federation in simulated time, under the broker's own code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fabric.broker import BrokerSettings
from fabric.testing.simulation import (
    ARRIVALS,
    BASELINES,
    World,
    make_federation,
    make_trace,
    make_world,
    simulate,
)
from fabric.testing.simulation.report import jain

NUM_REQUESTS = 250


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(4, 4, seed=1, mtbf_s=60.0)


@pytest.mark.parametrize("policy", BASELINES)
def test_every_request_ends_once_though_replicas_fail(world: World, policy: str) -> None:
    trace = make_trace(world, "bursty", num_requests=NUM_REQUESTS, utilisation=0.5)
    report = simulate(world, trace, policy)
    assert sorted(end.run_id for end in report.ends) == sorted(one.request.id for one in trace)
    assert any(end.attempts > 1 for end in report.ends)
    assert all(end.charge_usu > 0 for end in report.ends if end.completed)
    assert 0.0 < report.attainment <= 1.0
    assert report.percentile_s(50) <= report.percentile_s(95) <= report.percentile_s(99)


def test_the_same_seed_tells_the_same_story(world: World) -> None:
    trace = make_trace(world, "poisson", num_requests=NUM_REQUESTS)
    assert simulate(world, trace).row() == simulate(world, trace).row()


def test_one_request_on_an_idle_site_takes_what_its_hardware_takes() -> None:
    world = make_world(1, 1, seed=4, mtbf_s=None)
    site = replace(world.sites[0], num_replicas=1, num_cold=0, slowdown=0.0)
    world = replace(world, sites=(site,))
    arrival = make_trace(world, "poisson", num_requests=1, skew=0.0)[0]
    plain = arrival.request.model_copy(update={"data_site": None, "data_bytes": 0})
    arrival = replace(arrival, request=plain, prompt_tokens=400, output_tokens=9)
    (end,) = simulate(world, [arrival]).ends
    fastest_s = (400 / site.prefill_tokens_per_s + 8 / site.decode_tokens_per_s) / 1.2
    slowest_s = (400 / site.prefill_tokens_per_s + 8 / site.decode_tokens_per_s) / 0.8
    assert fastest_s <= end.total_s - 0.03 <= slowest_s


def test_a_replica_that_sleeps_is_started_when_nothing_else_serves() -> None:
    world = make_world(1, 1, seed=4, mtbf_s=None)
    site = replace(world.sites[0], num_replicas=1, num_cold=1, start_wait_s=10.0, load_s=5.0)
    world = replace(world, sites=(site,))
    awake = replace(world, sites=(replace(site, num_cold=0),))
    report = simulate(world, make_trace(awake, "poisson", num_requests=20))
    assert report.num_cold_starts == 1
    assert report.num_failed == 0
    first = min(report.ends, key=lambda end: end.at_s)
    assert first.total_s > 15.0


def test_our_choice_moves_less_data_and_is_faster_than_chance(world: World) -> None:
    trace = make_trace(world, "poisson", num_requests=600)
    ours, chance = (simulate(world, trace, policy) for policy in ("fabric", "random"))
    assert ours.percentile_s(95) < chance.percentile_s(95)
    assert ours.attainment > chance.attainment
    assert ours.bytes_moved < chance.bytes_moved


def test_what_is_long_goes_where_it_is_fast_so_that_all_is_sooner_and_cheaper() -> None:
    world = make_federation(seed=3)
    trace = make_trace(world, "poisson", num_requests=600)
    links = world.bandwidths_bytes_per_s
    settings = BrokerSettings(tick_s=0.5, bandwidths_bytes_per_s=links)
    alike = replace(settings, seconds_per_su=300.0, worth_power=0.0)
    by_length, one_for_all = (simulate(world, trace, settings=one) for one in (settings, alike))
    assert by_length.percentile_s(95) < one_for_all.percentile_s(95)
    assert by_length.spent_su < one_for_all.spent_su
    assert by_length.attainment >= one_for_all.attainment - 0.005


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_arrivals_come_in_order_at_the_mean_rate(arrivals: str) -> None:
    world = make_world(3, 1, seed=1)
    trace = make_trace(world, arrivals, num_requests=4000, utilisation=0.5)
    times = [one.at_s for one in trace]
    assert times == sorted(times)
    rate_per_s = len(times) / times[-1]
    assert rate_per_s == pytest.approx(0.5 * world.rows_per_s, rel=0.35)


def test_bursts_and_days_vary_more_than_chance() -> None:
    world = make_world(3, 1, seed=1)

    def dispersion(arrivals: str) -> float:
        times = [one.at_s for one in make_trace(world, arrivals, num_requests=4000)]
        counts = np.bincount(np.asarray(times).astype(int) // 10)[:-1]
        return float(counts.var() / counts.mean())

    assert dispersion("poisson") < 2.0 < min(dispersion("bursty"), dispersion("diurnal"))


def test_skew_gives_some_projects_most_of_the_requests() -> None:
    world = make_world(3, 1, seed=1)

    def largest(skew: float) -> float:
        trace = make_trace(world, "poisson", num_requests=1000, skew=skew)
        projects = [one.project for one in trace]
        return max(projects.count(name) for name in set(projects)) / len(projects)

    assert largest(0.0) < 0.1
    assert largest(1.5) > 0.3


def test_jain_is_one_for_equals_and_a_share_for_a_winner() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_a_line_at_the_hub_makes_an_overload_no_worse() -> None:
    world = make_world(4, 3, seed=1)
    trace = make_trace(world, "poisson", num_requests=500, utilisation=1.0, seed=3)
    settings = BrokerSettings(tick_s=0.5, max_table=4)
    line, heap = (
        simulate(world, trace, settings=replace(settings, fair=fair)) for fair in (True, False)
    )
    assert line.num_failed == 0
    assert line.attainment >= heap.attainment - 0.03
    assert line.percentile_s(95) <= 1.05 * heap.percentile_s(95)
