"""A ledger that is used, crashed at any statement and opened again, beside a model of it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, select

from fabric.errors import ChargeExceedsHold, Duplicate, HoldNotOpen, InsufficientBalance
from fabric.ledger import Ledger
from fabric.ledger.tables import accounts
from fabric.sql import Database
from fabric.testing.postgres import Postgres

LEASE_S = 60
SITES = ("*", "alpha")
NAMES = tuple(f"allocation:astro:{site}" for site in SITES)
names = st.sampled_from(NAMES)
amounts = st.integers(0, 120)


class Crash(BaseException):
    """The process ends here: no handler of the code under test may catch it."""


@dataclass
class ModelHold:
    allocation: str
    amount_usu: int
    expires_at: datetime
    state: str = "open"
    charged_usu: int = 0


class LedgerMachine(RuleBasedStateMachine):
    run_ids = Bundle("run_ids")
    new_url: Callable[[], AbstractContextManager[str]]

    def __init__(self) -> None:
        super().__init__()
        self.place = ExitStack()
        self.url = self.place.enter_context(type(self).new_url())
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.granted_usu = dict.fromkeys(NAMES, 100)
        self.holds: dict[str, ModelHold] = {}
        self.crash_at: int | None = None
        self.open()
        for site, name in zip(SITES, NAMES, strict=True):
            assert self.ledger.open_allocation("astro", site) == name
            self.ledger.grant(name, 100)

    def open(self) -> None:
        self.database = Database(self.url).open()
        self.ledger = Ledger(self.database, clock=lambda: self.now)
        self.num_steps = 0
        for name in ("before_cursor_execute", "commit"):
            event.listen(self.database.engine, name, self.step)

    def step(self, *_: object) -> None:
        self.num_steps += 1
        if self.crash_at is not None and self.num_steps >= self.crash_at:
            self.crash_at = None
            raise Crash

    def do(self, operation: Callable[[], object], *errors: type[Exception]) -> type | None:
        """Run it; after a crash open again and repeat it. Return the error it ended with."""
        self.num_steps = 0
        try:
            operation()
        except Crash:
            self.database.close()
            self.open()
            return self.do(operation, *errors)
        except errors as error:
            return type(error)
        finally:
            self.crash_at = None
        return None

    def available_usu(self, name: str) -> int:
        mine = [hold for hold in self.holds.values() if hold.allocation == name]
        held = sum(hold.amount_usu for hold in mine if hold.state == "open")
        return self.granted_usu[name] - held - sum(hold.charged_usu for hold in mine)

    @rule(step=st.integers(1, 12))
    def crash_in_the_next_operation(self, step: int) -> None:
        self.crash_at = step

    @rule(name=names, amount_usu=st.integers(1, 50))
    @precondition(lambda self: self.crash_at is None)  # a grant has no id to be repeated by
    def grant(self, name: str, amount_usu: int) -> None:
        self.ledger.grant(name, amount_usu)
        self.granted_usu[name] += amount_usu

    @rule(target=run_ids, number=st.integers(0, 5), name=names, amount_usu=amounts)
    def hold(self, number: int, name: str, amount_usu: int) -> str:
        run = f"run_{number}"
        known = self.holds.get(run)
        error = self.do(
            lambda: self.ledger.hold(run, allocation=name, amount_usu=amount_usu, lease_s=LEASE_S),
            Duplicate,
            HoldNotOpen,
            InsufficientBalance,
        )
        if known is None:
            short = self.available_usu(name) < amount_usu
            assert error is (InsufficientBalance if short else None)
            if not short:
                expires_at = self.now + timedelta(seconds=LEASE_S)
                self.holds[run] = ModelHold(name, amount_usu, expires_at)
        elif known.state != "open":
            assert error is HoldNotOpen
        else:
            same = (known.allocation, known.amount_usu) == (name, amount_usu)
            assert error is (None if same else Duplicate)
        return run

    @rule(run=run_ids, amount_usu=amounts, site=st.sampled_from(["alpha", "beta"]))
    def settle(self, run: str, amount_usu: int, site: str) -> None:
        hold = self.holds.get(run)
        error = self.do(
            lambda: self.ledger.settle(run, amount_usu, site=site), HoldNotOpen, ChargeExceedsHold
        )
        if hold is None or hold.state in ("voided", "expired"):
            assert error is HoldNotOpen
        elif hold.state == "settled":
            assert error is (None if hold.charged_usu == amount_usu else HoldNotOpen)
        elif amount_usu > hold.amount_usu:
            assert error is ChargeExceedsHold
        else:
            assert error is None
            hold.state, hold.charged_usu = "settled", amount_usu

    @rule(run=run_ids)
    def void(self, run: str) -> None:
        hold = self.holds.get(run)
        error = self.do(lambda: self.ledger.void(run), HoldNotOpen)
        assert error is (HoldNotOpen if hold is None or hold.state == "settled" else None)
        if hold is not None and hold.state == "open":
            hold.state = "voided"

    @rule(run=run_ids, name=names, amount_usu=amounts)
    def move(self, run: str, name: str, amount_usu: int) -> None:
        hold = self.holds.get(run)
        error = self.do(
            lambda: self.ledger.move_hold(run, name, amount_usu), HoldNotOpen, InsufficientBalance
        )
        if hold is None or hold.state != "open":
            assert error is HoldNotOpen
            return
        own_usu = hold.amount_usu if hold.allocation == name else 0
        short = self.available_usu(name) + own_usu < amount_usu
        assert error is (InsufficientBalance if short else None)
        if not short:
            hold.allocation, hold.amount_usu = name, amount_usu

    @rule(run=run_ids)
    def renew(self, run: str) -> None:
        hold = self.holds.get(run)
        self.do(lambda: self.ledger.renew([run], LEASE_S))
        if hold is not None and hold.state == "open":
            hold.expires_at = self.now + timedelta(seconds=LEASE_S)

    @rule(seconds=st.integers(0, 90))
    def expire(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.do(lambda: self.ledger.release_expired())
        for hold in self.holds.values():
            if hold.state == "open" and hold.expires_at <= self.now:
                hold.state = "expired"

    @invariant()
    def money_is_conserved_and_nowhere_negative(self) -> None:
        armed, self.crash_at = self.crash_at, None
        self.ledger.verify()
        for name in NAMES:
            mine = [hold for hold in self.holds.values() if hold.allocation == name]
            balance = self.ledger.allocation(name)
            assert balance.available_usu == self.available_usu(name) >= 0
            assert balance.held_usu == sum(h.amount_usu for h in mine if h.state == "open")
        charges = [line for line in self.ledger.statement("astro").lines if line.kind == "charge"]
        settled = {run: hold for run, hold in self.holds.items() if hold.state == "settled"}
        assert sorted(line.run for line in charges) == sorted(settled)
        assert all(-line.amount_usu == settled[line.run].charged_usu for line in charges)
        with self.database.read() as connection:
            balances = dict(
                connection.execute(select(accounts.c.name, accounts.c.balance_usu)).all()
            )
        assert sum(balances.values()) == 0
        assert [name for name, usu in balances.items() if usu < 0] == ["grants"]
        self.crash_at = armed

    def teardown(self) -> None:
        self.database.close()
        self.place.close()


@contextmanager
def copied(template: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(template, f"{folder}/fabric.db")
        yield f"sqlite:///{folder}/fabric.db"


@contextmanager
def created(postgres: Postgres) -> Iterator[str]:
    name = uuid4().hex
    yield postgres.create(name, template="migrated")
    postgres.drop(name)


@pytest.mark.parametrize(("backend", "num_examples"), [("sqlite", 60), ("postgresql", 25)])
def test_ledger_keeps_its_promises_through_crashes(
    request: pytest.FixtureRequest, backend: str, num_examples: int
) -> None:
    class Machine(LedgerMachine):
        if backend == "sqlite":
            new_url = partial(copied, request.getfixturevalue("migrated_path"))
        else:
            new_url = partial(created, request.getfixturevalue("migrated_postgres"))

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=num_examples, stateful_step_count=25, deadline=None)
    )
