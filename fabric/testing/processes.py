"""Looks for what a site's processes leave behind."""

from __future__ import annotations

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
