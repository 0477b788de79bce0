"""Kill a process at every statement of one ledger operation, each time on a fresh copy.

Usage: crash_rig.py DATABASE FOLDER hold|settle|move|void|release

Leaves FOLDER/1.db, 2.db, … and prints how each child ended: "killed" or, for the last, "done".
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from sqlalchemy import event

from fabric.ledger import Ledger
from fabric.sql import Database

ALLOCATION = "allocation:astro:*"
OTHER = "allocation:astro:alpha"
OPERATIONS = {
    "hold": lambda ledger: ledger.hold("new", allocation=ALLOCATION, amount_usu=100, lease_s=60),
    "settle": lambda ledger: ledger.settle("open", 70, site="alpha"),
    "move": lambda ledger: ledger.move_hold("open", OTHER, 50),
    "void": lambda ledger: ledger.void("open"),
    "release": lambda ledger: ledger.release_expired(),
}


def child(path: Path, operation: str, last_step: int) -> None:
    num_steps = 0

    def step(*_: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    with Database(f"sqlite:///{path}") as database:
        event.listen(database.engine, "before_cursor_execute", step)
        event.listen(database.engine, "commit", step)
        OPERATIONS[operation](Ledger(database))
        os._exit(0)


def main(template: str, folder: str, operation: str) -> None:
    for last_step in range(1, 100):
        path = Path(folder) / f"{last_step}.db"
        shutil.copy(template, path)
        pid = os.fork()
        if pid == 0:
            child(path, operation, last_step)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            print("killed", flush=True)
            continue
        print("done" if os.WEXITSTATUS(status) == 0 else "failed", flush=True)
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
