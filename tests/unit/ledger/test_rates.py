from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.errors import Duplicate, NotFound, RateMissing, RequestInvalid
from fabric.ledger import (
    PRICES,
    TIERS,
    Ledger,
    Rate,
    charge_usu,
    kv_block_s_bound,
    max_charge_usu,
    price_usu,
)
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


def test_each_price_is_stored_and_charged_for_its_own_quantity(ledger: Ledger) -> None:
    prices = {name: Decimal(number) for number, name in enumerate(PRICES, start=1)}
    made = ledger.set_rate("*", "*", **prices)
    assert ledger.rate("m", "s") == made
    for name, price in prices.items():
        assert price_usu(made, "standard", {name: 3}) == 3 * price
    assert price_usu(made, "batch", dict.fromkeys(PRICES, 1)) == ceil(sum(prices.values()) / 2)
    assert price_usu(made, "standard", {"stored_usu": 0.25, "adapter_usu": Decimal("0.5")}) == ceil(
        prices["stored_usu"] / 4 + prices["adapter_usu"] / 2
    )


@pytest.mark.parametrize("quantity", [-1, -0.5, float("nan"), float("inf"), Decimal("NaN")])
def test_quantity_that_is_none_is_refused(quantity: float | Decimal) -> None:
    with pytest.raises(RequestInvalid):
        price_usu(rate("1", "1", "1"), "standard", {"stored_usu": quantity})


def test_cache_that_is_kept_is_charged_within_its_bound() -> None:
    priced = replace(rate("0", "0", "0"), kv_block_usu=Decimal("0.5"))
    assert charge_usu(priced, "standard", Usage(kv_block_s=7.0)) == 4
    bound_s = kv_block_s_bound(2, 33, 10.0)  # two rows of three blocks, for ten seconds
    assert bound_s == 60.0
    assert max_charge_usu(priced, "standard", 1, 32, kv_block_s=bound_s) == 30


def test_adapters_slot_is_charged_by_the_hour_within_its_bound() -> None:
    priced = replace(rate("0", "0", "0"), adapter_usu=Decimal(7200))
    assert charge_usu(priced, "standard", Usage(adapter_s=1.5)) == 4  # 417 millionths of an hour
    assert max_charge_usu(priced, "standard", 1, 32, adapter_s=60.0) == 121
    assert max_charge_usu(priced, "standard", 1, 32) == 0


def test_rate_can_be_taken_back_until_it_is_in_effect(ledger: Ledger, clock) -> None:
    set_rate(ledger, "*", "*", 1)
    later = clock.now.replace(year=2027)
    set_rate(ledger, "*", "*", 2, effective_from=later)
    assert [one.prompt_usu for one in ledger.rates()] == [2, 1]
    ledger.delete_rate("*", "*", later)
    assert [one.prompt_usu for one in ledger.rates()] == [1]
    with pytest.raises(NotFound):
        ledger.delete_rate("*", "*", later)
    with pytest.raises(RequestInvalid, match="in effect"):
        ledger.delete_rate("*", "*", clock.now)
