import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fabric.errors import HoldNotOpen
from fabric.ledger import Ledger
from fabric.sql import Database, utc_now

RIG = Path(__file__).parent / "crash_rig.py"
ALLOCATION = "allocation:astro:*"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("operation", "after"),
    [
        ("hold", [[700, 200], [100, 0], [460, 0], [5]]),
        ("settle", [[830, 0], [100, 0], [460, 0], [6]]),
        ("move", [[900, 0], [100, 0], [410, 50], [5]]),
        ("void", [[900, 0], [100, 0], [460, 0], [5]]),
        ("release", [[900, 0], [100, 0], [460, 0], [5]]),
        ("grant", [[900, 100], [100, 0], [460, 0], [6]]),
        ("share", [[700, 100], [200, 0], [460, 0], [7]]),
        ("refund", [[800, 100], [100, 0], [490, 0], [6]]),
        ("exchange", [[700, 100], [100, 0], [560, 0], [7]]),
        ("expire", [[0, 100], [0, 0], [460, 0], [8]]),
    ],
)
def test_process_killed_at_any_step_leaves_all_or_nothing(
    database: Database, new_url: str, operation: str, after: list[list[int]]
) -> None:
    ledger = Ledger(database, clock=lambda: NOW)
    fabric_wide = ledger.open_allocation("astro", "*", ends_at=NOW + timedelta(days=1))
    site = ledger.open_allocation("astro", "alpha")
    share = ledger.open_share(fabric_wide, "key")
    for name, amount_usu in ((fabric_wide, 1000), (site, 500), (share, 100)):
        ledger.grant(name, amount_usu)
    ledger.hold("open", allocation=fabric_wide, amount_usu=100, lease_s=60)
    ledger.hold("settled", allocation=site, amount_usu=40, lease_s=60)
    ledger.settle("settled", 40, site="alpha")
    before = [[800, 100], [100, 0], [460, 0], [5]]
    ran = subprocess.run(
        [sys.executable, RIG, new_url, operation], capture_output=True, text=True, check=True
    )
    *killed, (was_killed, books) = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (was_killed, books) == (False, after)
    assert len(killed) > 5
    assert {was_killed for was_killed, _ in killed} == {True}
    assert [books for _, books in killed if books != before] == [
        after
    ]  # killed once it was written


def test_two_processes_share_one_ledger(database: Database, new_url: str) -> None:
    program = """
import sys
from fabric.errors import InsufficientBalance
from fabric.ledger import Ledger
from fabric.sql import Database
url, name = sys.argv[1:]
num_charged = 0
with Database(url) as database:
    ledger = Ledger(database)
    for number in range(150):
        run = f"{name}_{number}"
        try:
            ledger.hold(run, allocation="allocation:astro:*", amount_usu=10, lease_s=60)
        except InsufficientBalance:
            continue
        if number % 3:
            ledger.settle(run, 7, site=name)
            num_charged += 1
        else:
            ledger.void(run)
        ledger.settle("shared", 5, site="alpha")
print(num_charged)
"""
    ledger = Ledger(database)
    ledger.grant(ledger.open_allocation("astro", "*"), 1000)
    ledger.hold("shared", allocation=ALLOCATION, amount_usu=5, lease_s=60)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, new_url, name], stdout=subprocess.PIPE, text=True
        )
        for name in ("alpha", "beta")
    ]
    counts = [int(process.communicate(timeout=60)[0]) for process in processes]
    ledger.verify()
    allocation = ledger.allocation(ALLOCATION)
    assert allocation.held_usu == 0
    assert allocation.available_usu == 1000 - 5 - 7 * sum(counts) >= 0
    assert allocation.available_usu < 10
    charges = [line.run for line in ledger.statement("astro").lines if line.kind == "charge"]
    assert charges.count("shared") == 1


def test_hold_of_a_killed_hub_comes_back_after_its_lease(database: Database, new_url: str) -> None:
    program = """
import os, signal, sys
from fabric.ledger import Ledger
from fabric.sql import Database
with Database(sys.argv[1]) as database:
    Ledger(database).hold("run_1", allocation="allocation:astro:*", amount_usu=600, lease_s=60)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ledger = Ledger(database)
    ledger.grant(ledger.open_allocation("astro", "*"), 1000)
    ran = subprocess.run([sys.executable, "-c", program, new_url], check=False)
    assert ran.returncode == -9
    assert ledger.release_expired() == []
    assert ledger.allocation(ALLOCATION).available_usu == 400
    assert ledger.release_expired(utc_now() + timedelta(seconds=61)) == ["run_1"]
    assert ledger.allocation(ALLOCATION).available_usu == 1000
    with pytest.raises(HoldNotOpen):
        ledger.settle("run_1", 1, site="alpha")
    ledger.verify()
