"""Whether a job copies a model's weights to its nodes' own disks: a pure function of what is known.

A process reads its weights once, and once more where its version's digest is told from them by
another process than those that hold them. Copying is reading from the shared file system as well,
so it pays where weights are read again and again, where the copy is there already, or where the
nodes' disks are so much faster that a second read makes up for it. A replica that gives its own
copy may be faster than the file system; it tells the digests, too, and is asked only then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fabric.config import Storage
from fabric.messages import EngineOptions

Wish = Literal["auto", "always", "never"]

SPARE_BYTES = 2**30
"""What is left to others on a node's disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Whether weights are copied, from a replica or not, and why, in words."""

    pays: bool
    reason: str
    from_replica: bool = False


def count_reads(options: EngineOptions, ranks: Sequence[int]) -> float:
    """Return how often the first node reads the weights in a job, as often as they are whole.

    Args:
        options: How the engine is sized.
        ranks: Processes on each node.
    """
    if options.offload == "disk":
        return math.inf
    if options.backend == "vllm":
        return 2.0  # we take their digest, and the server loads them
    return 1.0 if sum(ranks) == 1 else 1.0 + ranks[0] / sum(ranks)


def choose_staging(
    *,
    num_bytes: int | None,
    reads: float,
    storage: Storage,
    free_bytes: int | None = None,
    is_known: bool = False,
    is_there: bool = False,
    is_missing: bool = False,
    replica_gb_s: float | None = None,
    wish: Wish = "auto",
) -> Staging:
    """Return whether weights are copied to the nodes' own disks.

    Args:
        num_bytes: Of the weights; ``None`` where nobody knows.
        reads: How often a node reads them.
        storage: How fast the machine's file systems are.
        free_bytes: On the node's disk; ``None``: all that the site file says it has.
        is_known: Whether their digests are, or must be taken first, which is one more read.
        is_there: Whether an earlier job has left a copy.
        is_missing: Whether a replica alone has them.
        replica_gb_s: How fast the fastest replica sends them, in GB/s; ``None``: none does.
        wish: What the owner says.
    """
    target = storage.local_dir
    if wish == "never":
        return Staging(pays=False, reason="read from where they are, as asked")
    if target is None:
        return Staging(pays=False, reason="read from where they are: no disk of the nodes is known")
    if is_there:
        return Staging(pays=True, reason=f"an earlier job has left them in {target}")
    if num_bytes is None:
        return Staging(pays=False, reason="decided in the job: their size is not known here")
    if free_bytes is None and storage.local_gb is not None:
        free_bytes = int(storage.local_gb * 1e9)
    if free_bytes is not None and num_bytes + SPARE_BYTES > free_bytes:
        free = f"{_gigabytes(free_bytes)} in {target} are too few for {_gigabytes(num_bytes)}"
        return Staging(pays=False, reason=f"read from where they are: {free}")
    if is_missing:
        reason = f"copied to {target} from a replica: they are nowhere else"
        return Staging(pays=True, reason=reason, from_replica=True)
    copy_s, from_replica = _get_copy_s(num_bytes, storage, replica_gb_s, is_known=is_known)
    place = f"{target}{' from a replica' if from_replica else ''}"
    if wish == "always":
        reason = f"copied to {place}, as asked"
        return Staging(pays=True, reason=reason, from_replica=from_replica)
    pays, reason = _weigh(num_bytes, reads, storage, copy_s, place)
    return Staging(pays=pays, reason=reason, from_replica=pays and from_replica)


def _get_copy_s(
    num_bytes: int, storage: Storage, replica_gb_s: float | None, *, is_known: bool
) -> tuple[float, bool]:
    """Return how many seconds a copy takes, and whether it then comes from a replica."""
    assert storage.shared_read_gb_s is not None, "a local_dir comes with all rates"
    assert storage.local_write_gb_s is not None, "a local_dir comes with all rates"
    gb = num_bytes / 1e9
    shared_s, write_s = gb / storage.shared_read_gb_s, gb / storage.local_write_gb_s
    from_shared_s = max(shared_s, write_s) + (0.0 if is_known else shared_s)
    from_replica_s = math.inf if not replica_gb_s else max(gb / replica_gb_s, write_s)
    return min(from_shared_s, from_replica_s), from_replica_s < from_shared_s


def _weigh(
    num_bytes: int, reads: float, storage: Storage, copy_s: float, place: str
) -> tuple[bool, str]:
    assert storage.shared_read_gb_s is not None, "a local_dir comes with all rates"
    assert storage.local_read_gb_s is not None, "a local_dir comes with all rates"
    shared_s = num_bytes / 1e9 / storage.shared_read_gb_s
    local_s = num_bytes / 1e9 / storage.local_read_gb_s
    size = _gigabytes(num_bytes)
    if math.isinf(reads):
        faster = storage.local_read_gb_s > storage.shared_read_gb_s
        rates = f"{storage.local_read_gb_s:g} GB/s there, {storage.shared_read_gb_s:g} shared"
        words = f"copied to {place}" if faster else "read from where they are"
        return faster, f"{words}: every step reads {size}, {rates}"
    with_s, without_s = copy_s + reads * local_s, reads * shared_s
    words = (
        f"{reads:.2g} x {size} take {without_s:.0f} s from the shared file system,"
        f" and {with_s:.0f} s with a copy in {place}"
    )
    pays = with_s < without_s
    return pays, f"{'copied' if pays else 'read from where they are'}: {words}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
