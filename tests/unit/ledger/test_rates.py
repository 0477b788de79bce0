from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.errors import Duplicate, RateMissing, RequestInvalid
from fabric.ledger import TIERS, Ledger, Rate, charge_usu, max_charge_usu
from fabric.messages import Usage
from fabric.sql import utc_now

counts = st.integers(0, 10**9)
micro_decimals = st.integers(0, 10**10).map(lambda n: Decimal(n).scaleb(-6))


def rate(prompt: str, cached: str, output: str) -> Rate:
    return Rate(
        model="*",
        site="*",
        effective_from=utc_now(),
        prompt_usu=Decimal(prompt),
        cached_prompt_usu=Decimal(cached),
        output_usu=Decimal(output),
    )


def set_rate(ledger: Ledger, model: str, site: str, price: int, **more: object) -> Rate:
    return ledger.set_rate(model, site, prompt_usu=price, cached_prompt_usu=0, output_usu=0, **more)


@pytest.mark.parametrize(
    ("tier", "expected_usu"), [("interactive", 1515), ("standard", 1010), ("batch", 505)]
)
def test_charge_is_the_sum_of_prices_times_the_tier(tier: str, expected_usu: int) -> None:
    usage = Usage(prompt_tokens=30, cached_prompt_tokens=10, output_tokens=20)
    assert charge_usu(rate("10", "1", "40"), tier, usage) == expected_usu


def test_charge_is_rounded_up_once() -> None:
    usage = Usage(prompt_tokens=2, cached_prompt_tokens=1, output_tokens=1)
    assert charge_usu(rate("0.3", "0.3", "0.3"), "standard", usage) == 1
    assert charge_usu(rate("0.000001", "0", "0"), "batch", usage) == 1
    assert charge_usu(rate("0", "0", "0"), "interactive", usage) == 0


def test_cached_tokens_beyond_the_prompt_lower_no_charge() -> None:
    forged = Usage(prompt_tokens=10, cached_prompt_tokens=1_000_000, output_tokens=1)
    assert charge_usu(rate("10", "1", "40"), "standard", forged) == 10 * 1 + 40


@settings(deadline=None)
@given(
    prices=st.tuples(micro_decimals, micro_decimals, micro_decimals),
    tier=st.sampled_from(sorted(TIERS)),
    tokens=st.tuples(counts, counts, counts),
)
def test_charge_is_exact_and_never_more_than_its_bound(
    prices: tuple[Decimal, Decimal, Decimal], tier: str, tokens: tuple[int, int, int]
) -> None:
    uncached, cached, output = tokens
    usage = Usage(
        prompt_tokens=uncached + cached, cached_prompt_tokens=cached, output_tokens=output
    )
    charged = charge_usu(rate(*map(str, prices)), tier, usage)
    exact = sum(Fraction(p) * n for p, n in zip(prices, tokens, strict=True)) * Fraction(
        TIERS[tier]
    )
    assert charged == ceil(exact)
    assert charged <= max_charge_usu(rate(*map(str, prices)), tier, uncached + cached, output)


def test_tiers_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TIERS["standard"] = Decimal(0)  # type: ignore[index]


def test_missing_rate_is_an_error_until_a_default_is_set(ledger: Ledger) -> None:
    with pytest.raises(RateMissing):
        ledger.rate("smol@1", "alpha")
    set_rate(ledger, "*", "*", 3)
    assert ledger.rate("smol@1", "alpha").prompt_usu == 3


def test_closest_rate_wins(ledger: Ledger) -> None:
    places = [("*", "*"), ("*", "alpha"), ("smol", "*"), ("smol", "alpha"), ("smol@1", "*")]
    for price, (model, site) in enumerate(places):
        set_rate(ledger, model, site, price)
    assert ledger.rate("other@1", "beta").prompt_usu == 0
    assert ledger.rate("other@1", "alpha").prompt_usu == 1
    assert ledger.rate("smol@2", "beta").prompt_usu == 2
    assert ledger.rate("smol@2", "alpha").prompt_usu == 3
    assert ledger.rate("smol@1", "alpha").prompt_usu == 4


def test_rate_counts_from_its_time_on(ledger: Ledger, clock) -> None:
    start = clock.now
    set_rate(ledger, "*", "*", 1)
    later = clock.advance(100)
    set_rate(ledger, "*", "*", 2, effective_from=later)
    set_rate(ledger, "*", "*", 3, effective_from=clock.advance(100))
    assert ledger.rate("m", "s", at=start).prompt_usu == 1
    assert ledger.rate("m", "s", at=later).prompt_usu == 2
    assert ledger.rate("m", "s").prompt_usu == 3
    with pytest.raises(RateMissing):
        ledger.rate("m", "s", at=start.replace(year=2020))
    with pytest.raises(Duplicate):
        set_rate(ledger, "*", "*", 9, effective_from=later)


def test_fractions_of_a_micro_su_are_kept(ledger: Ledger) -> None:
    made = ledger.set_rate(
        "*",
        "*",
        prompt_usu=Decimal("0.014"),
        cached_prompt_usu=Decimal("0.001401"),
        output_usu=7,
    )
    assert ledger.rate("m", "s") == made


@pytest.mark.parametrize("price", [-1, Decimal("0.0000001"), 10**10, Decimal("NaN")])
def test_price_that_cannot_be_stored_is_refused(ledger: Ledger, price: Decimal) -> None:
    with pytest.raises(RequestInvalid):
        ledger.set_rate("*", "*", prompt_usu=price, cached_prompt_usu=0, output_usu=0)
