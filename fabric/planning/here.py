"""This machine as a device: its processors and memory, measured."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fabric.errors import PackageMissing
from fabric.planning.devices import HERE, Device

_COPIED_BYTES = 2**26
_ORDER = 1024
_REPEATS = 5
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def measure_here() -> Device:
    """Return this machine as one device, without its accelerators. Takes about a second.

    The memory's rate is that of copies by all processors at once, and the arithmetic's that of a
    float32 matrix product, each the best of a few tries. There are no links, because a plan for it
    has one rank.

    Raises:
        PackageMissing: NumPy is not installed.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise PackageMissing(package="numpy", extra="site") from error

    num_threads = len(os.sched_getaffinity(0))
    sources = [np.ones(_COPIED_BYTES, np.uint8) for _ in range(num_threads)]
    targets = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(num_threads) as pool:
        copy_s = _best(lambda: list(pool.map(np.copyto, targets, sources)))
    matrix = np.ones((_ORDER, _ORDER), np.float32)
    product_s = _best(lambda: matrix @ matrix)
    rate = 2 * _ORDER**3 / product_s
    return Device(
        name=HERE,
        title="this machine's processors",
        memory_bytes=_memory_bytes(),
        # Every byte is read once and written once.
        memory_bytes_s=2 * num_threads * _COPIED_BYTES / copy_s,
        flops={"bf16": rate, "fp16": rate, "fp32": rate},
        link_bytes_s=math.inf,
        network_bytes_s=math.inf,
        devices_per_node=1,
        source="measured now: parallel copies, and a float32 matrix product for every dtype",
    )


def _best(work: Callable[[], object]) -> float:
    """Return the fewest seconds that a piece of work took."""
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _memory_bytes() -> int:
    """Return the machine's memory, or this container's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total
