"""A command on a terminal of its own, for tests of what people see and type."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

NEVER = "(?!)"


class Terminal:
    """Runs a command on a terminal of its own, which hangs up when the test's process ends.

    ``seen`` is all it has printed, ``arrivals`` when (monotonic seconds) it printed something.

    Args:
        environ: The command's environment.
        *argv: The command.
    """

    def __init__(self, environ: Mapping[str, str], *argv: str) -> None:
        self.master, slave = pty.openpty()
        # A session of its own, in the same process: signals that are sent are the command's.
        controlled = ("setsid", "--ctty", *argv)
        self.process = subprocess.Popen(
            controlled, env=environ, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.seen = ""
        self.arrivals: list[float] = []

    def read_until(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Return all it has printed once that contains a pattern.

        Raises:
            TimeoutError: It does not within ``timeout_s`` seconds.
            EOFError: The command ended first.
        """
        until = time.monotonic() + timeout_s
        while not re.search(pattern, self.seen):
            ready, _, _ = select.select([self.master], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {pattern!r} in {self.seen!r}")
            with suppress(OSError):
                if data := os.read(self.master, 4096):
                    self.seen += data.decode()
                    self.arrivals.append(time.monotonic())
                    continue
            raise EOFError(self.seen)
        return self.seen

    def type(self, text: str) -> None:
        """Type a text; a line ends with a line feed."""
        os.write(self.master, text.encode())

    def finish(self) -> int:
        """Wait for its end and return its exit code."""
        with suppress(EOFError):
            self.read_until(NEVER)
        os.close(self.master)
        return self.process.wait(30)
