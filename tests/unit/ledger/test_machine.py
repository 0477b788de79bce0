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
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, select

from fabric.errors import (
    AllocationClosed,
    ChargeExceedsHold,
    Duplicate,
    HoldNotOpen,
    InsufficientBalance,
    NotCharged,
    RefundExceedsCharge,
)
from fabric.ledger import Ledger
from fabric.ledger.tables import accounts
from fabric.sql import Database
from fabric.testing.postgres import Postgres

LEASE_S = 60
PERIOD_S = 240
ANYWHERE, ALPHA = "allocation:astro:*", "allocation:astro:alpha"
SHARE = f"{ALPHA}/key"
NAMES = (ANYWHERE, ALPHA, SHARE)
names = st.sampled_from(NAMES)
amounts = st.integers(0, 60)


class Crash(BaseException):
    """The process ends here: no handler of the code under test may catch it."""


@dataclass
class ModelHold:
    allocation: str
    amount_usu: int
    expires_at: datetime
    state: str = "open"
    charged_usu: int = 0
    refunded_usu: int = 0


class LedgerMachine(RuleBasedStateMachine):
    run_ids = Bundle("run_ids")
    new_url: Callable[[], AbstractContextManager[str]]

    def __init__(self) -> None:
        super().__init__()
        self.place = ExitStack()
        self.url = self.place.enter_context(type(self).new_url())
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.ends_at = self.now + timedelta(seconds=PERIOD_S)
        self.owned_usu = {ANYWHERE: 100, ALPHA: 60, SHARE: 40}
        self.lapsed_usu = 0
        self.keys: dict[str, tuple[object, ...]] = {}
        self.holds: dict[str, ModelHold] = {}
        self.crash_at: int | None = None
        self.open()
        assert self.ledger.open_allocation("astro", "*") == ANYWHERE
        assert self.ledger.open_allocation("astro", "alpha", ends_at=self.ends_at) == ALPHA
        assert self.ledger.open_share(ALPHA, "key") == SHARE
        for name, amount_usu in ((ANYWHERE, 100), (ALPHA, 100), (SHARE, 40)):
            self.ledger.grant(name, amount_usu)

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
        return self.owned_usu[name] - held

    def is_open(self, name: str) -> bool:
        return name == ANYWHERE or self.now < self.ends_at

    @rule(step=st.integers(1, 12))
    def crash_in_the_next_operation(self, step: int) -> None:
        self.crash_at = step

    @rule(number=st.integers(0, 8), name=names, amount_usu=st.integers(-50, 50).filter(bool))
    def grant_or_withdraw(self, number: int, name: str, amount_usu: int) -> None:
        key, was = f"grant_{number}", self.keys.get(f"grant_{number}")
        verb = "grant" if amount_usu > 0 else "withdraw"
        error = self.do(
            lambda: getattr(self.ledger, verb)(name, abs(amount_usu), key=key),
            Duplicate,
            InsufficientBalance,
        )
        if was is not None:
            assert error is (None if was == (name, amount_usu) else Duplicate)
            return
        source = {SHARE: ALPHA}.get(name)
        short = self.available_usu(name) + amount_usu < 0
        short = short or (source is not None and self.available_usu(source) < amount_usu)
        assert error is (InsufficientBalance if short else None)
        if not short:
            self.keys[key] = (name, amount_usu)
            self.owned_usu[name] += amount_usu
            if source is not None:
                self.owned_usu[source] -= amount_usu

    @rule(number=st.integers(0, 4), pair=st.permutations([ANYWHERE, ALPHA]), usu=amounts)
    def exchange(self, number: int, pair: list[str], usu: int) -> None:
        (source, target), key = pair, f"exchange_{number}"
        was, usu = self.keys.get(key), usu + 1
        error = self.do(
            lambda: self.ledger.exchange(source, target, usu, key=key),
            Duplicate,
            InsufficientBalance,
            AllocationClosed,
        )
        if was is not None:
            assert error is (None if was == (source, usu) else Duplicate)
        elif not self.is_open(ALPHA):
            assert error is AllocationClosed
        elif self.available_usu(source) < usu:
            assert error is InsufficientBalance
        else:
            assert error is None
            self.keys[key] = (source, usu)
            self.owned_usu[source] -= usu
            self.owned_usu[target] += usu

    def draw(self, data: st.DataObject, state: str) -> tuple[str, ModelHold | None]:
        """A run: mostly one of those in this state, where there are any."""
        wanted = [run for run, hold in self.holds.items() if hold.state == state]
        run = data.draw(st.sampled_from([*wanted * 3, *self.holds, "run_0"]))
        return run, self.holds.get(run)

    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        run, hold = self.draw(data, "settled")
        amount_usu = data.draw(st.integers(1, 2 + (hold.charged_usu if hold else 10)))
        key = f"refund_{run}_{amount_usu}"
        error = self.do(
            lambda: self.ledger.refund(run, amount_usu, key=key), NotCharged, RefundExceedsCharge
        )
        if hold is None or hold.state != "settled":
            assert error is NotCharged
        elif key in self.keys:
            assert error is None
        elif hold.refunded_usu + amount_usu > hold.charged_usu:
            assert error is RefundExceedsCharge
        else:
            assert error is None
            self.keys[key] = ()
            hold.refunded_usu += amount_usu
            self.owned_usu[hold.allocation] += amount_usu

    @rule(target=run_ids, number=st.integers(0, 5), name=names, amount_usu=amounts)
    def hold(self, number: int, name: str, amount_usu: int) -> str:
        run = f"run_{number}"
        known = self.holds.get(run)
        error = self.do(
            lambda: self.ledger.hold(run, allocation=name, amount_usu=amount_usu, lease_s=LEASE_S),
            Duplicate,
            HoldNotOpen,
            InsufficientBalance,
            AllocationClosed,
        )
        if known is None and not self.is_open(name):
            assert error is AllocationClosed
        elif known is None:
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

    @rule(data=st.data(), site=st.sampled_from(["alpha", "beta"]))
    def settle(self, data: st.DataObject, site: str) -> None:
        run, hold = self.draw(data, "open")
        amount_usu = data.draw(st.integers(0, 2 + (hold.amount_usu if hold else 10)))
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
            self.owned_usu[hold.allocation] -= amount_usu

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
            lambda: self.ledger.move_hold(run, name, amount_usu),
            HoldNotOpen,
            InsufficientBalance,
            AllocationClosed,
        )
        if hold is None or hold.state != "open":
            assert error is HoldNotOpen
            return
        if not self.is_open(name) and (hold.allocation, hold.amount_usu) != (name, amount_usu):
            assert error is AllocationClosed
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
        self.do(lambda: self.ledger.expire())
        if not self.is_open(ALPHA):
            back_usu = self.available_usu(SHARE)
            self.owned_usu[SHARE] -= back_usu
            self.owned_usu[ALPHA] += back_usu
            self.lapsed_usu += self.available_usu(ALPHA)
            self.owned_usu[ALPHA] -= self.available_usu(ALPHA)

    @invariant()
    def money_is_conserved_and_nowhere_negative(self) -> None:
        armed, self.crash_at = self.crash_at, None
        self.ledger.verify()
        for name in NAMES:
            mine = [hold for hold in self.holds.values() if hold.allocation == name]
            balance = self.ledger.allocation(name)
            assert balance.available_usu == self.available_usu(name) >= 0
            assert balance.held_usu == sum(h.amount_usu for h in mine if h.state == "open")
        lines = self.ledger.statement("astro").lines
        last_usu = {line.allocation: line.balance_usu for line in lines}
        assert last_usu == self.owned_usu
        charges = [line for line in lines if line.kind == "charge"]
        settled = {run: hold for run, hold in self.holds.items() if hold.state == "settled"}
        assert sorted(line.run for line in charges) == sorted(settled)
        assert all(-line.amount_usu == settled[line.run].charged_usu for line in charges)
        with self.database.read() as connection:
            balances = dict(
                connection.execute(select(accounts.c.name, accounts.c.balance_usu)).all()
            )
        assert sum(balances.values()) == 0
        assert [name for name, usu in balances.items() if usu < 0] == ["grants"]
        assert balances.get("expired", 0) == self.lapsed_usu
        for hold in self.holds.values():
            assert 0 <= hold.refunded_usu <= hold.charged_usu
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


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "num_examples"), [("sqlite", 30), ("postgresql", 15)])
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
