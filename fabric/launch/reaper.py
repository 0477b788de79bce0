"""``python -m fabric.launch.reaper <pid> [<folder>]``: when that process ends, so does its session.

A Globus Compute user endpoint that is killed leaves its interchange and workers behind, which hold
the site's memory and block, and a pid file, which keeps its successor from starting for a while.
As the ``endpoint_setup`` of its template this watches it from outside and clears up after it::

    endpoint_setup: >-
      globus-compute-endpoint python-exec fabric.launch.reaper $PPID $GLOBUS_COMPUTE_ENDPOINT_DIR
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Begin to watch, in a process of its own, and return.

    Args:
        argv: The user endpoint's process, and its folder, where its pid file is.
    """
    pid, *folder = int(argv[0]), *argv[1:]
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        print(f"There is no process {pid} to watch.", file=sys.stderr)
        return 1
    if os.fork():
        return 0
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    select.select([ended], [], [])
    end_session(pid)
    for directory in folder:
        forget_pid(Path(directory) / "daemon.pid", pid)
    return 0


def end_session(leader: int) -> None:
    """Kill what is left of a session, and what that starts meanwhile."""
    while members := [pid for pid in _pids() if _session(pid) == leader]:
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def forget_pid(path: Path, pid: int) -> None:
    """Remove a pid file, unless it is another's by now."""
    with suppress(FileNotFoundError):
        if path.read_text().strip() == str(pid):
            path.unlink()


def _pids() -> list[int]:
    return [int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal()]


def _session(pid: int) -> int | None:
    """Return the session of a process that still runs."""
    try:
        # The name, in parentheses, may have blanks; state, parent, group and session follow it.
        state, _, _, session = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split(maxsplit=4)[:4]
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(session)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
