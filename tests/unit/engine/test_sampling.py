"""Choices follow the distribution that the parameters describe."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fabric.engine.sampling import Draw, choose, finite_rows, score, uniform

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.9, -4.0, 0.0, 2.5])


def brute_force(logits, temperature, top_k, top_p):
    """Probabilities by the definitions, one token at a time."""
    scaled = [value / temperature for value in logits.tolist()]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    order = order[:top_k] if top_k else order
    mass = {i: math.exp(scaled[i]) for i in order}
    total = sum(mass.values())
    kept, before = {}, 0.0
    for i in order:
        if before < top_p:
            kept[i] = mass[i] / total
        before += mass[i] / total
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(scaled))]


def measured(logits, temperature, top_k, top_p, num=4000):
    """Frequencies over uniform numbers that fill [0, 1) evenly."""
    draws = [
        Draw(temperature=temperature, top_k=top_k, top_p=top_p, uniform=(i + 0.5) / num)
        for i in range(num)
    ]
    chosen = choose(logits.expand(num, -1), draws)
    return (np.bincount(chosen, minlength=len(logits)) / num).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [*itertools.product([0.5, 1.0, 1.7], [0, 1, 3], [0.3, 0.8, 1.0])],
)
def test_frequencies_equal_the_definition(temperature, top_k, top_p):
    expected = brute_force(LOGITS, temperature, top_k, top_p)
    assert measured(LOGITS, temperature, top_k, top_p) == pytest.approx(expected, abs=5e-4)


def test_top_p_over_a_flat_large_vocabulary_reaches_past_the_first_candidates():
    logits = torch.zeros(5000)
    frequencies = measured(logits, 1.0, 0, 0.5, num=5000)
    assert sum(frequency > 0 for frequency in frequencies) == 2500


def test_temperature_zero_is_greedy_and_tiny_ones_are_nearly():
    draws = [Draw(temperature=t, top_k=0, top_p=1.0, uniform=0.999) for t in (0.0, 1e-30)]
    assert choose(LOGITS.expand(2, -1), draws) == [3, 3]


def test_a_row_is_chosen_the_same_in_any_company():
    torch.manual_seed(0)
    logits = torch.randn(24, 3000)
    draws = [
        Draw(temperature=t, top_k=k, top_p=p, uniform=uniform(1, 0, i))
        for i, (t, k, p) in enumerate(
            itertools.product([0.0, 0.7, 1.3], [0, 5], [1.0, 0.9, 0.5, 0.1])
        )
    ]
    alone = [choose(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert choose(logits, draws) == alone


def test_uniform_numbers_are_uniform_distinct_and_repeatable():
    keys = list(itertools.product([-(2**63), 0, 2**63 - 1], [0, 1], range(200)))
    numbers = [uniform(*key) for key in keys]
    assert numbers == [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert all(0.0 <= number < 1.0 for number in numbers)
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert ((counts - 120) ** 2 / 120).sum() < 27.9  # chi-squared, 9 degrees, 1 in 1000


def test_rows_without_a_number_to_choose_by_are_named():
    rows = torch.tensor(
        [[1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [-math.inf, -math.inf]]
    )
    assert finite_rows(rows) == [True, False, False, True, False]


def test_scores_are_of_the_unmodified_softmax():
    (one,) = score(LOGITS[None], [0], 2)
    total = math.log(sum(math.exp(value) for value in LOGITS.tolist()))
    assert one.logprob == pytest.approx(2.0 - total, abs=1e-6)
    assert [token for token, _ in one.top] == [3, 7]
    assert [value for _, value in one.top] == pytest.approx([3.0 - total, 2.5 - total], abs=1e-6)
