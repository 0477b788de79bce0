import random
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.errors import MeasurementInsufficient
from fabric.ledger.measure import Sample, measure, usu_per_device_s


def runs(taken_s: tuple[float, float, float], num: int, *, noise: float = 0.0) -> list[Sample]:
    rng = random.Random(7)
    made = []
    for _ in range(num):
        uncached, cached, output = rng.randint(1, 4000), rng.randint(0, 2000), rng.randint(1, 500)
        exact_s = uncached * taken_s[0] + cached * taken_s[1] + output * taken_s[2]
        made.append(
            Sample(
                prompt_tokens=uncached + cached,
                cached_prompt_tokens=cached,
                output_tokens=output,
                device_s=exact_s * rng.uniform(1 - noise, 1 + noise),
            )
        )
    return made


def test_what_tokens_take_is_found_exactly_without_noise() -> None:
    found = measure(runs((2e-4, 1e-5, 8e-3), 40))
    assert [found.prompt_s, found.cached_prompt_s, found.output_s] == pytest.approx(
        [2e-4, 1e-5, 8e-3]
    )
    assert found.r2 == pytest.approx(1.0)


def test_what_tokens_take_is_found_through_noise() -> None:
    found = measure(runs((2e-4, 1e-5, 8e-3), 400, noise=0.2))
    assert found.prompt_s == pytest.approx(2e-4, rel=0.1)
    assert found.output_s == pytest.approx(8e-3, rel=0.05)
    assert 0.8 < found.r2 < 1


@settings(max_examples=30, deadline=None)
@given(
    seconds=st.lists(st.floats(0.001, 10), min_size=24, max_size=24),
    seed=st.integers(0, 1000),
)
def test_no_token_takes_less_than_nothing_and_no_nearby_answer_is_better(
    seconds: list[float], seed: int
) -> None:
    rng = random.Random(seed)
    samples = [
        Sample(
            prompt_tokens=rng.randint(50, 100),
            cached_prompt_tokens=rng.randint(0, 50),
            output_tokens=rng.randint(1, 100),
            device_s=one,
        )
        for one in seconds
    ]
    found = measure(samples)
    taken_s = np.array([found.prompt_s, found.cached_prompt_s, found.output_s])
    assert (taken_s >= 0).all()
    tokens_RK = np.array(
        [
            (s.prompt_tokens - s.cached_prompt_tokens, s.cached_prompt_tokens, s.output_tokens)
            for s in samples
        ]
    )

    def error(some_s: np.ndarray) -> float:
        return float(((tokens_RK @ some_s - np.array(seconds)) ** 2).sum())

    for _ in range(50):
        step_s = np.array([rng.gauss(0, 1e-3) for _ in range(3)])
        assert error(taken_s) <= error(np.clip(taken_s + step_s, 0, None)) + 1e-9


def test_part_of_cached_tokens_is_assumed_where_none_were_seen() -> None:
    plain = [
        Sample(
            prompt_tokens=run.prompt_tokens - run.cached_prompt_tokens,
            cached_prompt_tokens=0,
            output_tokens=run.output_tokens,
            device_s=(run.prompt_tokens - run.cached_prompt_tokens) * 1e-4
            + run.output_tokens * 0.01,
        )
        for run in runs((0, 0, 0), 30)
    ]
    found = measure(plain)
    assert not found.cached_was_seen
    assert found.cached_prompt_s == pytest.approx(0.1 * found.prompt_s)


def test_runs_that_tell_nothing_are_refused() -> None:
    with pytest.raises(MeasurementInsufficient, match="at least 20"):
        measure(runs((1e-4, 1e-5, 1e-3), 19), model="smol@1", site="alpha")
    alike = [
        Sample(prompt_tokens=10 * n, cached_prompt_tokens=0, output_tokens=n, device_s=n)
        for n in range(1, 40)
    ]
    with pytest.raises(MeasurementInsufficient, match="same proportion"):
        measure(alike)
    idle = [
        Sample(prompt_tokens=1, cached_prompt_tokens=0, output_tokens=n, device_s=0.0)
        for n in range(1, 40)
    ]
    with pytest.raises(MeasurementInsufficient, match="The 0 runs"):
        measure(idle)


def test_prices_are_the_seconds_times_what_a_second_costs() -> None:
    second_usu = usu_per_device_s(Decimal("3.6"), 2, 4)
    assert second_usu == 500  # half a node at 3.6 SU an hour, in micro-SU a second
    prices = measure(runs((2e-4, 1e-5, 8e-3), 40)).prices(second_usu)
    assert [round(price, 3) for price in prices.values()] == [
        Decimal("0.1"),
        Decimal("0.005"),
        Decimal(4),
    ]
