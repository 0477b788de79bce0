from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, text, update
from sqlalchemy.exc import IntegrityError

from fabric.errors import (
    Duplicate,
    InsufficientBalance,
    LedgerInconsistent,
    RequestInvalid,
    UnknownAccount,
)
from fabric.ledger import Ledger, Statement
from fabric.ledger.tables import accounts, entries
from fabric.sql import Database


def run(ledger: Ledger, hold_id: str, allocation: str, amount_usu: int, site: str) -> None:
    ledger.hold(hold_id, allocation=allocation, amount_usu=amount_usu + 7, lease_s=60)
    ledger.settle(hold_id, amount_usu, site=site, model="smol@1", memo="tier standard")


def amounts(statement: Statement) -> list[tuple[str, int, int]]:
    return [(line.kind, line.amount_usu, line.balance_usu) for line in statement.lines]


def test_statement_lists_grants_and_charges_with_the_balance_after(ledger: Ledger, clock) -> None:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 1000, memo="first year")
    run(ledger, "run_1", name, 100, "alpha")
    ledger.hold("run_2", allocation=name, amount_usu=50, lease_s=60)
    ledger.hold("run_3", allocation=name, amount_usu=50, lease_s=60)
    ledger.void("run_3")
    ledger.withdraw(name, 200)
    statement = ledger.statement("astro")
    assert amounts(statement) == [
        ("grant", 1000, 1000),
        ("charge", -100, 900),
        ("withdrawal", -200, 700),
    ]
    grant, charge, _ = statement.lines
    assert (grant.memo, grant.run, grant.at) == ("first year", None, clock.now)
    assert (charge.run, charge.site, charge.model) == ("run_1", "alpha", "smol@1")
    (allocation,) = statement.allocations
    assert (allocation.available_usu, allocation.held_usu) == (650, 50)
    assert statement.complete


def test_charge_of_nothing_is_a_line_too(ledger: Ledger) -> None:
    name = ledger.open_allocation("astro", "*")
    ledger.hold("run_1", allocation=name, amount_usu=0, lease_s=60)
    ledger.settle("run_1", 0, site="alpha")
    assert amounts(ledger.statement("astro")) == [("charge", 0, 0)]


def test_period_and_limit_cut_lines_but_not_balances(ledger: Ledger, clock) -> None:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 1000)
    times = []
    for number in range(1, 6):
        times.append(clock.advance(10))
        run(ledger, f"run_{number}", name, number, "alpha")
    clock.advance(10)
    ledger.grant(name, 500)
    period = ledger.statement("astro", since=times[1], until=times[4])
    assert amounts(period) == [("charge", -2, 997), ("charge", -3, 994), ("charge", -4, 990)]
    newest = ledger.statement("astro", limit=2)
    assert amounts(newest) == [("charge", -5, 985), ("grant", 500, 1485)]
    assert (period.complete, newest.complete) == (True, False)


def test_project_sees_its_own_lines_only(ledger: Ledger) -> None:
    ours, theirs = ledger.open_allocation("astro", "*"), ledger.open_allocation("bio", "*")
    ledger.grant(ours, 10)
    ledger.grant(theirs, 20)
    assert amounts(ledger.statement("astro")) == [("grant", 10, 10)]
    assert ledger.statement("nobody").lines == ()
    assert [a.project for a in ledger.allocations()] == ["astro", "bio"]
    assert [a.project for a in ledger.allocations("bio")] == ["bio"]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None
)
@given(
    steps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 90)), max_size=12),
    cut=st.integers(0, 12),
)
def test_lines_add_up_to_what_the_allocations_have(
    database: Database, ledger: Ledger, steps: list[tuple[int, int]], cut: int, clock
) -> None:
    project = f"p{clock.advance(1).timestamp():.0f}"
    names = [ledger.open_allocation(project, site) for site in ("*", "alpha")]
    for name in names:
        ledger.grant(name, 2000)
    for number, (which, amount_usu) in enumerate(steps):
        clock.advance(1)
        run(ledger, f"{project}_{number}", names[which], amount_usu, "beta")
    since = clock.now - timedelta(seconds=cut)
    for statement in (ledger.statement(project), ledger.statement(project, since=since)):
        for allocation in statement.allocations:
            lines = [line for line in statement.lines if line.allocation == allocation.name]
            for before, after in pairwise(lines):
                assert after.balance_usu == before.balance_usu + after.amount_usu
            if lines:
                owned_usu = allocation.available_usu + allocation.held_usu
                assert lines[-1].balance_usu == owned_usu


def test_allocation_is_opened_once(ledger: Ledger) -> None:
    ledger.open_allocation("astro", "*")
    with pytest.raises(Duplicate):
        ledger.open_allocation("astro", "*")


@pytest.mark.parametrize(("project", "site"), [("", "*"), ("a:b", "*"), ("a", ""), ("a", "b:c")])
def test_name_that_would_be_ambiguous_is_refused(ledger: Ledger, project: str, site: str) -> None:
    with pytest.raises(RequestInvalid):
        ledger.open_allocation(project, site)


def test_allocation_that_ends_before_it_starts_is_refused(ledger: Ledger, clock) -> None:
    with pytest.raises(RequestInvalid):
        ledger.open_allocation("astro", "*", starts_at=clock.now, ends_at=clock.now)
    name = ledger.open_allocation("astro", "*", starts_at=clock.now)
    with pytest.raises(RequestInvalid):
        ledger.modify_allocation(name, ends_at=clock.now - timedelta(days=1))


def test_no_more_than_is_available_can_be_withdrawn(ledger: Ledger) -> None:
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 100)
    ledger.hold("run_1", allocation=name, amount_usu=60, lease_s=60)
    with pytest.raises(InsufficientBalance):
        ledger.withdraw(name, 41)
    ledger.withdraw(name, 40)
    with pytest.raises(UnknownAccount):
        ledger.withdraw("allocation:astro:beta", 1)


@pytest.mark.parametrize("table", ["entries", "journal"])
@pytest.mark.parametrize("change", ["DELETE FROM {}", "UPDATE {} SET {}"], ids=["delete", "update"])
def test_what_was_written_cannot_be_changed(
    database: Database, ledger: Ledger, table: str, change: str
) -> None:
    ledger.grant(ledger.open_allocation("astro", "*"), 100)
    column = {"entries": "amount_usu = 0", "journal": "memo = 'x'"}[table]
    with (
        pytest.raises(IntegrityError, match="never changed"),
        database.transaction() as connection,
    ):
        connection.execute(text(change.format(table, column)))


def test_audit_finds_a_balance_that_is_not_its_entries(database: Database) -> None:
    ledger = Ledger(database)
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 100)
    ledger.verify()
    with database.transaction() as connection:
        connection.execute(update(accounts).where(accounts.c.name == name).values(balance_usu=101))
    with pytest.raises(LedgerInconsistent, match=r"balance of 101 where its entries sum to 100"):
        ledger.verify()


def test_audit_finds_entries_that_do_not_sum_to_zero(database: Database) -> None:
    ledger = Ledger(database)
    ledger.grant(ledger.open_allocation("astro", "*"), 100)
    with database.transaction() as connection:
        income = connection.execute(
            insert(accounts).returning(accounts.c.id),
            {"name": "income:rogue", "balance_usu": 5, "may_go_negative": False},
        ).scalar_one()
        connection.execute(
            insert(entries), {"journal_id": 1, "account_id": income, "amount_usu": 5}
        )
    with pytest.raises(LedgerInconsistent, match="journal row 1 sums to 5"):
        ledger.verify()


def test_audit_finds_a_hold_without_its_money_and_a_charge_without_its_entry(
    database: Database,
) -> None:
    ledger = Ledger(database)
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, 100)
    ledger.hold("run_1", allocation=name, amount_usu=60, lease_s=60)
    with database.transaction() as connection:
        connection.execute(text("UPDATE holds SET state = 'settled'"))
    with pytest.raises(LedgerInconsistent) as caught:
        ledger.verify()
    assert caught.value.detail["problems"] == [
        f"held:{name} has a balance of 60 where its open holds sum to 0",
        "the hold run_1 was charged 0 times",
    ]


def test_database_itself_refuses_a_negative_balance(database: Database) -> None:
    name = Ledger(database).open_allocation("astro", "*")
    with pytest.raises(IntegrityError), database.transaction() as connection:
        connection.execute(update(accounts).where(accounts.c.name == name).values(balance_usu=-1))
