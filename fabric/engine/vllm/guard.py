"""``python -m fabric.engine.vllm.guard <command> …``: a command that ends when its owner does.

The owner holds the guard's standard input open. When that closes, or the command ends, what is
left of the command's process group is killed: vLLM's workers outlive a server that was killed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress


def main(command: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    os.setpgid(0, 0)  # a signal to the owner's group is the owner's to handle
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    select.select([sys.stdin, os.pidfd_open(process.pid)], [], [])
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
