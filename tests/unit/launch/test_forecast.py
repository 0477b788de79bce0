"""Bounds of waits hold as often as they say, also when the waits change."""

import math
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest

from fabric.errors import RequestInvalid
from fabric.launch.forecast import (
    CONFIDENCE,
    WaitEstimator,
    WaitForecast,
    WaitHistory,
    get_least_waits,
    get_rank,
    get_run_length,
)

HOUR_S = 3600.0


def steady(rng: random.Random) -> Iterator[float]:
    for _ in range(2000):
        yield rng.lognormvariate(7, 2)


def changing(rng: random.Random) -> Iterator[float]:
    """Ten regimes of unlike length whose medians are a minute to two days."""
    for _ in range(10):
        median_s = 60 * 10 ** rng.uniform(0, 3.4)
        for _ in range(rng.randint(100, 400)):
            yield rng.lognormvariate(math.log(median_s), 1)


def climbing(rng: random.Random) -> Iterator[float]:
    """Every change is for the worse, which is the hardest for a bound from above."""
    for step in range(8):
        for _ in range(250):
            yield rng.lognormvariate(3 + step, 0.7)


def correlated(rng: random.Random) -> Iterator[float]:
    """The wait of a job is like that of the one before it."""
    level = 0.0
    for _ in range(2500):
        level = 0.6 * level + 0.8 * rng.gauss(0, 1)
        yield math.exp(7 + level)


@pytest.mark.parametrize("trace", [steady, changing, climbing, correlated])
@pytest.mark.parametrize("seed", range(3))
def test_nine_of_ten_waits_stay_under_the_bound_told_before(trace: object, seed: int) -> None:
    history, held, told = WaitHistory(), 0, 0
    for wait_s in trace(random.Random(seed)):  # type: ignore[operator]
        bound_s = history.get_bound_s(0.9)
        if bound_s is not None:
            told += 1
            held += wait_s <= bound_s
        history.add(wait_s)
    assert told > 1000
    assert held / told >= 0.9


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_bound_is_above_the_true_quantile_with_the_stated_confidence(quantile: float) -> None:
    rng = random.Random(7)
    above = 0
    for _ in range(400):
        history = WaitHistory()
        for _ in range(60):
            history.add(rng.random())
        bound = history.get_bound_s(quantile)
        assert bound is not None
        above += bound >= quantile
    # Three standard deviations of 400 trials.
    assert above / 400 >= CONFIDENCE - 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / 400)


@pytest.mark.parametrize("num_waits", [1, 5, 28, 29, 30, 59, 100, 233])
@pytest.mark.parametrize(("tenths", "quantile"), [(5, 0.5), (9, 0.9)])
def test_rank_is_the_least_that_exact_arithmetic_allows(
    num_waits: int, tenths: int, quantile: float
) -> None:
    share = Fraction(tenths, 10)
    below = [
        sum(math.comb(num_waits, j) * share**j * (1 - share) ** (num_waits - j) for j in range(k))
        for k in range(1, num_waits + 1)
    ]
    exact = next((k for k, sure in enumerate(below, 1) if sure >= Fraction(95, 100)), None)
    assert get_rank(num_waits, quantile) == exact


def test_published_sizes() -> None:
    """Brevik, Nurmi, Wolski: 59 waits bound the 0.95 quantile; three misses are a change."""
    assert get_least_waits(0.95) == 59
    assert get_rank(58, 0.95) is None
    assert get_rank(59, 0.95) == 59
    assert get_run_length(0.95) == 3


def test_change_is_noticed_after_three_misses() -> None:
    history = WaitHistory()
    for _ in range(500):
        history.add(60)
    history.add(HOUR_S)
    history.add(HOUR_S)
    assert history.get_bound_s(0.9) == 60
    history.add(HOUR_S)
    assert history.get_bound_s(0.9) == HOUR_S
    assert len(history) == 29


def test_old_short_waits_are_forgotten_in_the_end() -> None:
    history = WaitHistory(max_waits=100)
    for wait_s in [HOUR_S] * 100 + [60.0] * 100:
        history.add(wait_s)
    assert history.get_bound_s(0.9) == 60
    assert len(history) == 100


def test_too_few_waits_bound_nothing() -> None:
    estimator = WaitEstimator()
    assert estimator.forecast("gpu", nodes=1, walltime_s=60) == WaitForecast(
        p50_s=None, p90_s=None, num_waits=0
    )
    for _ in range(28):
        estimator.record("gpu", nodes=1, walltime_s=60, wait_s=5)
    assert estimator.forecast("gpu", nodes=1, walltime_s=60).p90_s is None
    assert estimator.forecast("gpu", nodes=1, walltime_s=60, hint_s=7) == WaitForecast(
        p50_s=7, p90_s=7, num_waits=0
    )


def test_scheduler_says_the_median_and_no_bound_is_below_it() -> None:
    estimator = WaitEstimator()
    for wait_s in range(100, 0, -1):
        estimator.record("gpu", nodes=1, walltime_s=HOUR_S, wait_s=wait_s)
    ask = {"nodes": 1, "walltime_s": HOUR_S}
    alone = estimator.forecast("gpu", **ask)  # type: ignore[arg-type]
    assert (alone.p50_s, alone.p90_s, alone.num_waits) == (59, 96, 100)
    idle = estimator.forecast("gpu", **ask, hint_s=0)  # type: ignore[arg-type]
    assert (idle.p50_s, idle.p90_s) == (0, 96)
    drained = estimator.forecast("gpu", **ask, hint_s=5 * HOUR_S)  # type: ignore[arg-type]
    assert (drained.p50_s, drained.p90_s) == (5 * HOUR_S, 5 * HOUR_S)


def test_jobs_are_compared_with_the_closest_that_are_enough() -> None:
    estimator = WaitEstimator()
    for _ in range(40):
        estimator.record("gpu", nodes=1, walltime_s=600, wait_s=10)
        estimator.record("gpu", nodes=64, walltime_s=600, wait_s=1000)
        estimator.record("cpu", nodes=1, walltime_s=600, wait_s=1)

    def p90_s(queue: str, nodes: int, walltime_s: float) -> float | None:
        return estimator.forecast(queue, nodes=nodes, walltime_s=walltime_s).p90_s

    assert p90_s("gpu", 1, 900) == 10
    assert p90_s("gpu", 100, 900) == 1000
    assert p90_s("gpu", 1, 40 * HOUR_S) == 10
    assert p90_s("gpu", 8, 900) == 1000
    assert p90_s("cpu", 1, 900) == 1
    assert p90_s("large", 1, 900) is None


@pytest.mark.parametrize("wait_s", [-1.0, math.inf, math.nan])
def test_what_is_no_wait_is_refused_and_not_kept(wait_s: float) -> None:
    history = WaitHistory()
    with pytest.raises(RequestInvalid, match="wait_s"):
        history.add(wait_s)
    assert len(history) == 0
