"""Processes that outlive the command that starts them: start, recognise, end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from fabric.config import ProcessRecord


def spawn(
    argv: Sequence[str],
    *,
    log_path: Path,
    stdin: str = "",
    environ: Mapping[str, str] | None = None,
) -> ProcessRecord:
    """Start a process in a session of its own, its output going to a file.

    Args:
        argv: The program's path and its arguments; never a secret, because any user may read them.
        log_path: Where standard output and error are appended.
        stdin: Text given on standard input, which is then closed.
        environ: Variables to set besides those of this process.

    Returns:
        The process; its pid is the id of its process group too.
    """
    read_end, write_end = os.pipe()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    # Not subprocess: its objects warn when they are dropped while their process still runs.
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        {**os.environ, **(environ or {})},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, read_end, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_path), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    os.close(read_end)
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(stdin.encode())
    return ProcessRecord(pid=pid, started_at=psutil.Process(pid).create_time())


def find(record: ProcessRecord) -> psutil.Process | None:
    """Return the process of a record, unless it has ended or its pid belongs to another by now."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started_at) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def family(record: ProcessRecord) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    process = find(record)
    if process is None:
        return []
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(record: ProcessRecord) -> None:
    """End a process, its group and its descendants at once, as a power cut would."""
    processes = family(record)
    if processes:
        os.killpg(record.pid, signal.SIGKILL)
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=5)


def end(records: Sequence[ProcessRecord], *, grace_s: float) -> None:
    """Ask processes to end, wait, and kill what is left of them and of their descendants."""
    processes = [process for record in records for process in family(record)]
    for record in records:
        if find(record) is not None:
            os.kill(record.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)


def poll(timeout_s: float, interval_s: float = 0.1) -> Iterator[None]:
    """Yield at intervals until the time is over."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        yield
        time.sleep(interval_s)
