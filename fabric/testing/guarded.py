"""Processes of a rig: each ends when this process does, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from fabric.launch.guard import get_guarded

STOP_TIMEOUT_S = 30.0


class Guarded:
    """A command under a guard (``fabric.launch.guard``), with its output in a file.

    Args:
        command: The program and its arguments.
        log: Where its output goes.
        environ: All of its environment; this process's when ``None``.
        directory: Where it runs; where this process does when ``None``.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._log = log
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                get_guarded(command),
                env=environ,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._guard.poll() is None

    @property
    def log_tail(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text(errors="replace")[-4000:]

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to end, and end it if it does not within the time."""
        self._guard.terminate()
        try:
            self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it, and what is in its process group, at once."""
        while self.running:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                for command in psutil.Process(self._guard.pid).children():
                    os.killpg(command.pid, signal.SIGKILL)
            time.sleep(0.01)
