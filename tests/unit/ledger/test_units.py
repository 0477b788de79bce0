from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import Duplicate, RequestInvalid, UnknownUnit
from fabric.ledger import Ledger, Unit
from fabric.sql import utc_now

NODE_HOUR = Unit(name="node-hour", effective_from=utc_now(), usu=Decimal("2500000"))


def test_unit_is_worth_what_was_said_for_that_time(ledger: Ledger, clock) -> None:
    with pytest.raises(UnknownUnit, match=r"'node-hour' .* 2026-01-01"):
        ledger.unit("node-hour")
    first = ledger.set_unit("node-hour", 2_500_000)
    second = ledger.set_unit(
        "node-hour", Decimal("1250000.5"), effective_from=clock.now + timedelta(days=10)
    )
    assert ledger.unit("node-hour") == first
    clock.advance(10 * 86_400)
    assert ledger.unit("node-hour") == second
    assert ledger.unit("node-hour", at=first.effective_from) == first
    assert ledger.units() == [second, first]
    with pytest.raises(Duplicate):
        ledger.set_unit("node-hour", 1, effective_from=second.effective_from)


def test_amounts_are_rounded_as_asked() -> None:
    assert NODE_HOUR.to_usu(Decimal("4")) == 10_000_000
    assert NODE_HOUR.to_usu(Decimal("0.0000001")) == 0
    assert NODE_HOUR.to_usu(Decimal("0.0000001"), up=True) == 1
    assert NODE_HOUR.from_usu(10_000_001) == Decimal("4.000000")


@given(usu=st.integers(0, 10**15))
def test_what_is_exchanged_back_and_forth_is_never_more(usu: int) -> None:
    assert usu - 3 <= NODE_HOUR.to_usu(NODE_HOUR.from_usu(usu)) <= usu


@pytest.mark.parametrize("amount", ["-1", "NaN", "Infinity", "1e999999999", "1e-999999999"])
def test_amount_that_is_none_is_refused(amount: str) -> None:
    with pytest.raises(RequestInvalid):
        NODE_HOUR.to_usu(Decimal(amount))


@pytest.mark.parametrize(
    ("name", "usu"), [("", 1), ("node hour", 1), ("n", 0), ("n", -1), ("n", 10**10)]
)
def test_unit_that_cannot_be_is_refused(ledger: Ledger, name: str, usu: int) -> None:
    with pytest.raises(RequestInvalid):
        ledger.set_unit(name, usu)
