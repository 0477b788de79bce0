"""Kill a process at every step of one ledger operation, and repeat it until one gets through.

Usage: crash_rig.py URL OPERATION

A step is a statement, a commit, or the return of a connection after it. Prints a line of JSON for
each process: whether it was killed, and the books after it.
"""

import json
import os
import signal
import sys
from datetime import UTC, datetime

from sqlalchemy import event

from fabric.ledger import Ledger
from fabric.sql import Database

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2027, 1, 1, tzinfo=UTC)
ALLOCATION = "allocation:astro:*"
OTHER = "allocation:astro:alpha"
SHARE = f"{ALLOCATION}/key"
OPERATIONS = {
    "hold": lambda ledger: ledger.hold("new", allocation=ALLOCATION, amount_usu=100, lease_s=60),
    "settle": lambda ledger: ledger.settle("open", 70, site="alpha"),
    "move": lambda ledger: ledger.move_hold("open", OTHER, 50),
    "void": lambda ledger: ledger.void("open"),
    "release": lambda ledger: ledger.release_expired(LATER),
    "grant": lambda ledger: ledger.grant(ALLOCATION, 100, key="k"),
    "share": lambda ledger: ledger.grant(SHARE, 100, key="k"),
    "refund": lambda ledger: ledger.refund("settled", 30, key="k"),
    "exchange": lambda ledger: ledger.exchange(ALLOCATION, OTHER, 100, key="k"),
    "expire": lambda ledger: ledger.expire(LATER),
}


def books(ledger: Ledger) -> list[list[int]]:
    """What is available and held in the allocations, and how many lines the statement has."""
    ledger.verify()
    found = ledger.allocations("astro")
    lines = ledger.statement("astro").lines
    return [*([each.available_usu, each.held_usu] for each in found), [len(lines)]]


def child(url: str, operation: str, last_step: int) -> None:
    num_steps = 0

    def step(*_: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    with Database(url) as database:
        event.listen(database.engine, "before_cursor_execute", step)
        event.listen(database.engine, "commit", step)
        event.listen(database.engine, "reset", step)
        OPERATIONS[operation](Ledger(database, clock=lambda: NOW))
        os._exit(0)


def main(url: str, operation: str) -> None:
    for last_step in range(1, 200):
        pid = os.fork()
        if pid == 0:
            child(url, operation, last_step)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            sys.exit("the operation failed")
        with Database(url) as database:
            after = books(Ledger(database, clock=lambda: NOW))
        print(json.dumps([os.WIFSIGNALED(status), after]), flush=True)
        if not os.WIFSIGNALED(status):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
