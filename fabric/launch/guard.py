"""``python -m fabric.launch.guard <pid> <command> …``: a command that ends when its owner does.

Parsl's interchange and worker pools outlive the process that started them when it is killed, and
would hold the site's memory for ever; so do workers whose pool was killed. A guard stands between:
it runs the command in a process group of its own, and when either the owner or the command has
ended it kills what is left of the group.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence


def get_guarded(command: Sequence[str], owner_pid: int | None = None) -> list[str]:
    """Return the command line of ``command`` under a guard.

    Args:
        command: The program and its arguments.
        owner_pid: Whose end is the command's end; this process when ``None``.
    """
    owner = str(owner_pid or os.getpid())
    return [sys.executable, "-m", "fabric.launch.guard", owner, *command]


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    owner_pid = int(argv[0])
    try:
        owner = os.pidfd_open(owner_pid)
        if os.getpgrp() == os.getpgid(owner_pid):
            os.setpgid(0, 0)  # or the guard would be killed together with its owner's group
    except ProcessLookupError:
        return 1
    with subprocess.Popen(argv[1:], process_group=0) as command:
        signal.signal(signal.SIGTERM, lambda *_: command.terminate())
        select.select([owner, os.pidfd_open(command.pid)], [], [])
        os.killpg(command.pid, signal.SIGKILL)
        return command.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
