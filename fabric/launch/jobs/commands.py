"""Asking a scheduler's commands: never through a shell, never for long."""

from __future__ import annotations

import subprocess

from fabric.errors import SchedulerFailed

TIMEOUT_S = 60.0


def run(*command: str) -> str:
    """Return what a command writes to standard output.

    Raises:
        SchedulerFailed: It is not there, takes over a minute, or failed.
    """
    done = try_run(*command)
    if done.returncode:
        raise SchedulerFailed(command=command[0], reason=done.stderr.strip() or "it failed")
    return done.stdout


def try_run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail.

    Raises:
        SchedulerFailed: It is not there, or takes over a minute.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerFailed(command=command[0], reason=str(error)) from error
