"""Looks for what a site's processes leave behind."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil


def guarded_by(owner_pid: int) -> list[psutil.Process]:
    """Return the guards that run for a process, and all their descendants.

    Parsl starts blocks through a shell that ends, so they are no descendants of their owner.
    """
    mark = f"fabric.launch.guard {owner_pid} "
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.cmdline()):
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def wait_ended(processes: Iterable[psutil.Process], *, timeout_s: float) -> list[psutil.Process]:
    """Return what still runs after the time, at once if nothing does.

    A zombie has ended: how soon an orphan is reaped is the machine's first process's affair.
    """
    until = time.monotonic() + timeout_s
    left = list(processes)
    while (left := [one for one in left if _runs(one)]) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
