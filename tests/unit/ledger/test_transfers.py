"""Periods, shares, refunds and exchanges: how amounts come, go and lapse."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest

from fabric.errors import (
    AllocationClosed,
    Duplicate,
    InsufficientBalance,
    NotCharged,
    RefundExceedsCharge,
    RequestInvalid,
    UnknownAccount,
)
from fabric.ledger import Ledger

ALICE, BOB = "0a1b2c3d4e5f", "globus:6ba7b810-9dad-11d1-80b4-00c04fd430c8"
DAY_S = 86_400


def has(ledger: Ledger, name: str) -> tuple[int, int]:
    balance = ledger.allocation(name)
    return balance.available_usu, balance.held_usu


def run(ledger: Ledger, run_id: str, allocation: str, amount_usu: int) -> None:
    ledger.hold(run_id, allocation=allocation, amount_usu=amount_usu, lease_s=60)
    ledger.settle(run_id, amount_usu, site="alpha")


def lines(ledger: Ledger, allocation: str) -> list[tuple[str, int, int]]:
    found = ledger.statement("astro", allocation=allocation).lines
    return [(line.kind, line.amount_usu, line.balance_usu) for line in found]


# Shares


def test_share_is_taken_from_its_allocation_and_never_more_than_that_has(
    ledger: Ledger, allocation: str
) -> None:
    share = ledger.open_share(allocation, ALICE)
    ledger.grant(share, 300)
    assert (has(ledger, allocation), has(ledger, share)) == ((700, 0), (300, 0))
    with pytest.raises(InsufficientBalance):
        ledger.grant(share, 701)
    ledger.withdraw(share, 100)
    assert (has(ledger, allocation), has(ledger, share)) == ((800, 0), (200, 0))
    with pytest.raises(InsufficientBalance):
        ledger.withdraw(share, 201)
    assert lines(ledger, share) == [("share", 300, 300), ("return", -100, 200)]
    assert lines(ledger, allocation) == [
        ("grant", 1000, 1000),
        ("share", -300, 700),
        ("return", 100, 800),
    ]


def test_holder_of_a_share_spends_it_and_nobody_else_does(ledger: Ledger, allocation: str) -> None:
    elsewhere = ledger.open_allocation("astro", "alpha")
    share = ledger.open_share(allocation, ALICE)
    assert [one.name for one in ledger.payers("astro", ALICE)] == [share, elsewhere]
    assert [one.name for one in ledger.payers("astro", BOB)] == [allocation, elsewhere]
    held = ledger.allocation(share)
    assert (held.holder, held.parent, held.site) == (ALICE, allocation, "*")


def test_only_what_is_open_can_be_spent(ledger: Ledger, clock) -> None:
    old = ledger.open_allocation("astro", "*", period="2025", ends_at=clock.now)
    new = ledger.open_allocation("astro", "*", period="2026", starts_at=clock.now)
    assert old == "allocation:astro:*:2025"
    assert [one.name for one in ledger.payers("astro", ALICE)] == [new]
    with pytest.raises(Duplicate):
        ledger.open_allocation("astro", "*", period="2026")


@pytest.mark.parametrize("holder", ["", "a/b"])
def test_holder_without_a_name_is_refused(ledger: Ledger, allocation: str, holder: str) -> None:
    with pytest.raises(RequestInvalid):
        ledger.open_share(allocation, holder)


def test_share_is_not_divided_again_and_has_its_allocations_times(
    ledger: Ledger, allocation: str, clock
) -> None:
    share = ledger.open_share(allocation, BOB)
    with pytest.raises(Duplicate):
        ledger.open_share(allocation, BOB)
    with pytest.raises(RequestInvalid):
        ledger.open_share(share, ALICE)
    with pytest.raises(RequestInvalid):
        ledger.modify_allocation(share, ends_at=clock.now)
    with pytest.raises(UnknownAccount):
        ledger.open_share("allocation:astro:beta", ALICE)
    end = clock.now + timedelta(days=1)
    ledger.modify_allocation(allocation, ends_at=end)
    assert ledger.allocation(share).ends_at == end


def test_shares_taken_at_once_are_never_more_than_the_allocation(
    ledger: Ledger, allocation: str
) -> None:
    shares = [ledger.open_share(allocation, f"key{number}") for number in range(20)]
    together = Barrier(20)

    def take(share: str) -> bool:
        together.wait()
        try:
            ledger.grant(share, 150)
        except InsufficientBalance:
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(take, shares)) == 6
    assert has(ledger, allocation) == (100, 0)


# Periods


def test_what_is_unused_lapses_when_the_period_is_over(ledger: Ledger, clock) -> None:
    name = ledger.open_allocation("astro", "*", ends_at=clock.now + timedelta(days=1))
    ledger.grant(name, 1000)
    share = ledger.open_share(name, ALICE)
    ledger.grant(share, 400)
    run(ledger, "run_1", share, 100)
    ledger.hold("run_2", allocation=share, amount_usu=50, lease_s=10 * DAY_S)
    assert ledger.expire() == []
    clock.advance(DAY_S)
    assert ledger.expire() == [share, name]
    assert ledger.expire() == []
    assert (has(ledger, share), has(ledger, name)) == ((0, 50), (0, 0))
    assert lines(ledger, name)[-2:] == [("return", 250, 850), ("expiry", -850, 0)]
    ledger.settle("run_2", 20, site="alpha")
    assert ledger.expire() == [share, name]
    assert (has(ledger, share), has(ledger, name)) == ((0, 0), (0, 0))
    assert lines(ledger, name)[-1] == ("expiry", -30, 0)


def test_periods_lapse_once_whoever_looks(ledger: Ledger, clock) -> None:
    for site in ("*", "alpha", "beta"):
        ledger.grant(ledger.open_allocation("astro", site, ends_at=clock.now), 100)
    together = Barrier(10)

    def expire(_: int) -> list[str]:
        together.wait()
        return ledger.expire()

    with ThreadPoolExecutor(10) as pool:
        lapsed = [name for names in pool.map(expire, range(10)) for name in names]
    assert sorted(lapsed) == [f"allocation:astro:{site}" for site in ("*", "alpha", "beta")]


def test_one_period_can_be_read_alone(ledger: Ledger) -> None:
    for period, amount_usu in (("2026", 100), ("2027", 200)):
        ledger.grant(ledger.open_allocation("astro", "*", period=period), amount_usu)
    statement = ledger.statement("astro", allocation="allocation:astro:*:2027")
    assert [line.amount_usu for line in statement.lines] == [200]
    assert [one.period for one in statement.allocations] == ["2027"]
    assert len(ledger.statement("astro").lines) == 2
    assert ledger.statement("bio", allocation="allocation:astro:*:2027").lines == ()


# Refunds


def test_refund_is_an_entry_that_names_the_charge(ledger: Ledger, allocation: str) -> None:
    run(ledger, "run_1", allocation, 100)
    refund = ledger.refund("run_1", 30, memo="node failed")
    assert (refund.refunded_usu, refund.charged_usu) == (30, 100)
    assert has(ledger, allocation) == (930, 0)
    *_, charge, back = ledger.statement("astro").lines
    assert (charge.kind, charge.amount_usu, charge.mends) == ("charge", -100, None)
    assert (back.kind, back.amount_usu, back.balance_usu) == ("refund", 30, 930)
    assert (back.mends, back.run, back.memo) == (charge.entry, "run_1", "node failed")
    assert ledger.refund("run_1").refunded_usu == 100
    assert has(ledger, allocation) == (1000, 0)
    assert ledger.refund("run_1").refunded_usu == 100


def test_refunds_are_never_more_than_the_charge(ledger: Ledger, allocation: str) -> None:
    run(ledger, "run_1", allocation, 100)
    run(ledger, "run_2", allocation, 500)
    ledger.refund("run_1", 60)
    with pytest.raises(RefundExceedsCharge):
        ledger.refund("run_1", 41)
    together = Barrier(10)

    def refund(_: int) -> bool:
        together.wait()
        try:
            ledger.refund("run_2", 150)
        except RefundExceedsCharge:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(refund, range(10))) == 3
    assert has(ledger, allocation) == (1000 - 40 - 50, 0)


@pytest.mark.parametrize("amount_usu", [0, -1, 10**16, 1.5, True, "1", float("nan")])
def test_refund_of_no_amount_is_refused(ledger: Ledger, allocation: str, amount_usu: int) -> None:
    run(ledger, "run_1", allocation, 100)
    with pytest.raises(RequestInvalid):
        ledger.refund("run_1", amount_usu)


def test_what_was_not_charged_is_not_refunded(ledger: Ledger, allocation: str) -> None:
    ledger.hold("run_1", allocation=allocation, amount_usu=100, lease_s=60)
    for unknown in ("run_1", "run_9"):
        with pytest.raises(NotCharged, match=unknown):
            ledger.refund(unknown, 1)
    ledger.settle("run_1", 0, site="alpha")
    assert ledger.refund("run_1").refunded_usu == 0


def test_refund_of_all_that_is_left_is_made_once(ledger: Ledger, allocation: str) -> None:
    run(ledger, "run_1", allocation, 100)
    ledger.refund("run_1", 30)
    for _ in range(2):
        assert ledger.refund("run_1", key="rest").refunded_usu == 100
    assert has(ledger, allocation) == (1000, 0)


# Exchanges


def test_exchange_moves_between_allocations_of_a_project(
    ledger: Ledger, allocation: str, clock
) -> None:
    site = ledger.open_allocation("astro", "alpha")
    ledger.exchange(allocation, site, 400, memo="4 node-hour")
    assert (has(ledger, allocation), has(ledger, site)) == ((600, 0), (400, 0))
    assert lines(ledger, allocation)[-1] == ("exchange", -400, 600)
    assert lines(ledger, site) == [("exchange", 400, 400)]
    with pytest.raises(InsufficientBalance):
        ledger.exchange(allocation, site, 601)
    theirs = ledger.open_allocation("bio", "*")
    share = ledger.open_share(allocation, ALICE)
    for target in (theirs, allocation, share):
        with pytest.raises(RequestInvalid):
            ledger.exchange(allocation, target, 1)
    ledger.modify_allocation(site, ends_at=clock.advance(1))
    with pytest.raises(AllocationClosed):
        ledger.exchange(allocation, site, 1)


# Charges without a hold


def test_charge_without_a_hold_is_made_once_and_within_the_balance(
    ledger: Ledger, allocation: str, clock
) -> None:
    for _ in range(2):
        ledger.charge(allocation, 400, key="rent-1", site="hub", memo="1 GiB stored for a day")
    assert has(ledger, allocation) == (600, 0)
    assert lines(ledger, allocation)[-1] == ("charge", -400, 600)
    with pytest.raises(InsufficientBalance):
        ledger.charge(allocation, 601, key="rent-2", site="hub")
    ledger.modify_allocation(allocation, ends_at=clock.advance(1))
    with pytest.raises(AllocationClosed):
        ledger.charge(allocation, 1, key="rent-3", site="hub")
    ledger.charge(allocation, 400, key="rent-1", site="hub", memo="said again")


# Keys


def test_entry_with_a_key_is_made_once(ledger: Ledger, allocation: str) -> None:
    site = ledger.open_allocation("astro", "alpha")
    run(ledger, "run_1", allocation, 100)
    for _ in range(2):
        ledger.grant(allocation, 50, key="grant-1")
        ledger.withdraw(allocation, 20, key="withdrawal-1")
        ledger.exchange(allocation, site, 30, key="exchange-1")
        assert ledger.refund("run_1", 100, key="refund-1").refunded_usu == 100
    assert (has(ledger, allocation), has(ledger, site)) == ((1000, 0), (30, 0))
    for again in (
        lambda: ledger.grant(allocation, 51, key="grant-1"),
        lambda: ledger.grant(site, 50, key="grant-1"),
        lambda: ledger.withdraw(allocation, 50, key="grant-1"),
        lambda: ledger.refund("run_1", 50, key="grant-1"),
    ):
        with pytest.raises(Duplicate, match="grant-1"):
            again()


def test_twenty_with_one_key_at_once_are_one(ledger: Ledger, allocation: str) -> None:
    together = Barrier(20)

    def grant(_: int) -> None:
        together.wait()
        ledger.grant(allocation, 50, key="grant-1")

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(grant, range(20)))
    assert has(ledger, allocation) == (1050, 0)
