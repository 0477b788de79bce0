import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest
from sqlalchemy import event

from fabric.errors import (
    AllocationClosed,
    ChargeExceedsHold,
    Duplicate,
    FabricError,
    HoldNotOpen,
    InsufficientBalance,
    RequestInvalid,
    StorageFull,
    UnknownAccount,
)
from fabric.ledger import HoldState, Ledger
from fabric.sql import Database

LEASE_S = 60.0


def has(ledger: Ledger, name: str) -> tuple[int, int]:
    balance = ledger.allocation(name)
    return balance.available_usu, balance.held_usu


def hold(ledger: Ledger, allocation: str, amount_usu: int, hold_id: str = "run_1") -> None:
    ledger.hold(hold_id, allocation=allocation, amount_usu=amount_usu, lease_s=LEASE_S)


def test_settling_charges_and_returns_the_rest(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 300)
    assert has(ledger, allocation) == (700, 300)
    settlement = ledger.settle("run_1", 120, site="alpha")
    assert (settlement.charged_usu, settlement.returned_usu) == (120, 180)
    assert has(ledger, allocation) == (880, 0)


def test_hold_twice_holds_once(ledger: Ledger, allocation: str) -> None:
    first = ledger.hold("run_1", allocation=allocation, amount_usu=300, lease_s=LEASE_S)
    again = ledger.hold("run_1", allocation=allocation, amount_usu=300, lease_s=LEASE_S)
    assert first == again
    assert has(ledger, allocation) == (700, 300)


def test_hold_of_the_same_id_for_something_else_is_refused(ledger: Ledger, allocation: str) -> None:
    other = ledger.open_allocation("astro", "alpha")
    hold(ledger, allocation, 300)
    with pytest.raises(Duplicate):
        hold(ledger, allocation, 301)
    with pytest.raises(Duplicate):
        hold(ledger, other, 300)
    assert has(ledger, allocation) == (700, 300)


def test_settle_twice_charges_once(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 300)
    first = ledger.settle("run_1", 120, site="alpha")
    assert ledger.settle("run_1", 120, site="alpha") == first
    with pytest.raises(HoldNotOpen):
        ledger.settle("run_1", 121, site="alpha")
    assert has(ledger, allocation) == (880, 0)


def test_charge_over_the_hold_is_refused_and_the_hold_stays(
    ledger: Ledger, allocation: str
) -> None:
    hold(ledger, allocation, 300)
    with pytest.raises(ChargeExceedsHold):
        ledger.settle("run_1", 301, site="alpha")
    assert has(ledger, allocation) == (700, 300)
    ledger.settle("run_1", 300, site="alpha")
    assert has(ledger, allocation) == (700, 0)


def test_void_returns_everything_once(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 300)
    ledger.void("run_1")
    ledger.void("run_1")
    assert has(ledger, allocation) == (1000, 0)
    with pytest.raises(HoldNotOpen):
        ledger.settle("run_1", 1, site="alpha")
    with pytest.raises(HoldNotOpen):
        hold(ledger, allocation, 300)


def test_settled_hold_cannot_be_voided(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 300)
    ledger.settle("run_1", 300, site="alpha")
    with pytest.raises(HoldNotOpen):
        ledger.void("run_1")


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger, _: ledger.settle("run_9", 1, site="alpha"),
        lambda ledger, _: ledger.void("run_9"),
        lambda ledger, allocation: ledger.move_hold("run_9", allocation, 1),
    ],
)
def test_unknown_hold_is_an_error(
    ledger: Ledger, allocation: str, act: Callable[[Ledger, str], object]
) -> None:
    with pytest.raises(HoldNotOpen, match="unknown"):
        act(ledger, allocation)


def test_more_than_the_balance_is_refused_with_the_numbers(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 900)
    with pytest.raises(InsufficientBalance) as caught:
        hold(ledger, allocation, 101, "run_2")
    assert caught.value.detail == {
        "account": allocation,
        "needed_usu": 101,
        "available_usu": 100,
    }
    hold(ledger, allocation, 100, "run_2")
    assert has(ledger, allocation) == (0, 1000)


@pytest.mark.parametrize("amount_usu", [-1, 10**15 + 1, 1.5, True, "1"])
def test_amount_that_is_none_is_refused(ledger: Ledger, allocation: str, amount_usu: int) -> None:
    with pytest.raises(RequestInvalid):
        hold(ledger, allocation, amount_usu)
    with pytest.raises(RequestInvalid):
        ledger.settle("run_1", amount_usu, site="alpha")
    with pytest.raises(RequestInvalid):
        ledger.grant(allocation, amount_usu)


def test_unknown_allocation_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(UnknownAccount):
        hold(ledger, "allocation:nobody:*", 1)
    with pytest.raises(UnknownAccount):
        ledger.grant("grants", 1)


def test_allocation_is_usable_in_its_time_only(ledger: Ledger, clock) -> None:
    name = ledger.open_allocation(
        "astro",
        "alpha",
        starts_at=clock.now + timedelta(days=1),
        ends_at=clock.now + timedelta(days=2),
    )
    ledger.grant(name, 1000)
    with pytest.raises(AllocationClosed):
        hold(ledger, name, 1)
    clock.advance(86_400)
    hold(ledger, name, 1)
    clock.advance(86_400)
    with pytest.raises(AllocationClosed):
        hold(ledger, name, 1, "run_2")
    ledger.settle("run_1", 1, site="alpha")
    ledger.modify_allocation(name, ends_at=clock.now + timedelta(days=1))
    hold(ledger, name, 1, "run_2")


def test_moved_hold_is_charged_where_it_moved(ledger: Ledger, allocation: str) -> None:
    other = ledger.open_allocation("astro", "alpha")
    ledger.grant(other, 500)
    hold(ledger, allocation, 300)
    ledger.move_hold("run_1", other, 400)
    ledger.move_hold("run_1", other, 400)
    assert (has(ledger, allocation), has(ledger, other)) == ((1000, 0), (100, 400))
    ledger.settle("run_1", 350, site="alpha")
    assert (has(ledger, allocation), has(ledger, other)) == ((1000, 0), (150, 0))


def test_move_that_cannot_be_paid_changes_nothing(ledger: Ledger, allocation: str) -> None:
    other = ledger.open_allocation("astro", "alpha")
    ledger.grant(other, 10)
    hold(ledger, allocation, 300)
    with pytest.raises(InsufficientBalance):
        ledger.move_hold("run_1", other, 300)
    assert (has(ledger, allocation), has(ledger, other)) == ((700, 300), (10, 0))


def test_hold_may_grow_within_its_allocation(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 900)
    ledger.move_hold("run_1", allocation, 1000)
    assert has(ledger, allocation) == (0, 1000)
    with pytest.raises(InsufficientBalance):
        ledger.move_hold("run_1", allocation, 1001)


def test_lease_that_passes_returns_the_hold(ledger: Ledger, allocation: str, clock) -> None:
    hold(ledger, allocation, 300)
    clock.advance(LEASE_S - 1)
    hold(ledger, allocation, 200, "run_2")
    assert ledger.release_expired() == []
    clock.advance(1)
    assert ledger.release_expired() == ["run_1"]
    assert ledger.release_expired() == []
    assert has(ledger, allocation) == (800, 200)
    with pytest.raises(HoldNotOpen, match="expired"):
        ledger.settle("run_1", 1, site="alpha")
    ledger.void("run_1")


def test_renewed_lease_is_kept(ledger: Ledger, allocation: str, clock) -> None:
    hold(ledger, allocation, 300)
    hold(ledger, allocation, 200, "run_2")
    ledger.void("run_2")
    clock.advance(50)
    assert ledger.renew(["run_1", "run_2", "run_9"], LEASE_S) == ["run_1"]
    assert ledger.renew([], LEASE_S) == []
    clock.advance(50)
    assert ledger.release_expired() == []
    assert ledger.release_expired(clock.now + timedelta(seconds=10)) == ["run_1"]


def test_work_done_after_its_lease_is_charged_unless_it_was_released(
    ledger: Ledger, allocation: str, clock
) -> None:
    hold(ledger, allocation, 300)
    clock.advance(2 * LEASE_S)
    ledger.settle("run_1", 300, site="alpha")
    assert has(ledger, allocation) == (700, 0)


def test_fifty_at_once_on_a_balance_for_one_admit_exactly_one(
    ledger: Ledger, allocation: str
) -> None:
    together = Barrier(50)

    def admit(number: int) -> FabricError | None:
        together.wait()
        try:
            hold(ledger, allocation, 1000, f"run_{number}")
        except InsufficientBalance as error:
            return error
        return None

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(admit, range(50)))
    assert outcomes.count(None) == 1
    assert has(ledger, allocation) == (0, 1000)


def test_twenty_holds_of_one_run_at_once_are_one(ledger: Ledger, allocation: str) -> None:
    together = Barrier(20)

    def admit(_: int) -> str:
        together.wait()
        held = ledger.hold("run_1", allocation=allocation, amount_usu=300, lease_s=LEASE_S)
        return held.id

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(admit, range(20))) == ["run_1"] * 20
    assert has(ledger, allocation) == (700, 300)


def test_fifty_results_at_once_for_one_run_charge_once(ledger: Ledger, allocation: str) -> None:
    hold(ledger, allocation, 100)
    together = Barrier(50)

    def settle(_: int) -> int:
        together.wait()
        return ledger.settle("run_1", 70, site="alpha").charged_usu

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(settle, range(50))) == [70] * 50
    assert has(ledger, allocation) == (930, 0)


def test_several_calls_may_share_one_commit(
    database: Database, ledger: Ledger, allocation: str
) -> None:
    def settle_then_fail() -> None:
        with database.transaction():
            ledger.settle("run_1", 120, site="alpha")
            raise ZeroDivisionError

    hold(ledger, allocation, 300)
    with pytest.raises(ZeroDivisionError):
        settle_then_fail()
    assert has(ledger, allocation) == (700, 300)


def test_refused_hold_leaves_nothing_in_the_commit_it_was_part_of(
    database: Database, ledger: Ledger, allocation: str
) -> None:
    with database.transaction():
        hold(ledger, allocation, 600)
        with pytest.raises(InsufficientBalance):
            hold(ledger, allocation, 600, "run_2")
    assert has(ledger, allocation) == (400, 600)
    with pytest.raises(HoldNotOpen, match="unknown"):
        ledger.void("run_2")


@pytest.mark.parametrize("new_url", ["sqlite"], indirect=True)
def test_full_disk_is_a_typed_error_and_the_books_add_up(
    database: Database, ledger: Ledger, allocation: str
) -> None:
    with database.read() as connection:
        num_pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one() + 4

    @event.listens_for(database.engine, "checkout")
    def limit(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {num_pages}")

    def admit_until_full() -> None:
        for number in range(1000):
            hold(ledger, allocation, 1, f"run_{number}")
            num_held.append(number)

    num_held: list[int] = []
    with pytest.raises(StorageFull):
        admit_until_full()
    assert num_held
    assert has(ledger, allocation) == (1000 - len(num_held), len(num_held))
    ledger.verify()
    num_pages += 1000
    ledger.settle("run_0", 1, site="alpha")
    assert has(ledger, allocation) == (1000 - len(num_held), len(num_held) - 1)


def test_hold_tells_where_it_stands(ledger: Ledger, allocation: str, clock) -> None:
    made = ledger.hold("run_1", allocation=allocation, amount_usu=5, lease_s=LEASE_S)
    assert made.state is HoldState.OPEN
    assert made.lease_expires_at == clock.now + timedelta(seconds=LEASE_S)
