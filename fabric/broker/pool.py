"""The replicas in columns, so that a choice among thousands is a dozen vector operations.

Shapes: N rows (replicas), G groups (a model version at a site), K rows of a few chosen ones,
S sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fabric.broker.facts import ReplicaSnapshot
from fabric.messages import InstanceState

PRIOR_PREFILL_TOKENS_PER_S = 2_000.0
PRIOR_DECODE_TOKENS_PER_S = 30.0
MIN_TOKENS_PER_S = 0.01
MAX_PREFIXES = 4_096
MAX_SITE_LISTS = 256

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

_COLUMNS = (
    *("overhead_s", "prefill_s", "decode_s", "max_rows", "num_busy", "num_in_flight", "share"),
    *("wait", "load", "failures", "cold_s", "ends_at", "context_tokens", "blocked_s"),
    "max_in_flight",
)


class Pool:
    """Replicas at one moment, or from moment to moment if somebody ``put``s what changes.

    ``blocked_s`` is infinite for a replica that takes nothing now; ``wait`` and ``load`` are the
    shares of one request's own seconds that it waits for a row, and waits or loses to others.

    Args:
        snapshots: What is known at first.
    """

    def __init__(self, snapshots: Iterable[ReplicaSnapshot] = ()) -> None:
        self.now = 0.0
        self.snapshots: list[ReplicaSnapshot] = []
        self.groups: dict[str, dict[str, int]] = {}
        """The group of each site, by digest."""
        self.num_groups = 0
        self.in_flight_of: Counter[str] = Counter()
        """How many attempts this hub has at each site."""
        self._row_of: dict[str, int] = {}
        self._affine: dict[tuple[bytes, int], list[int]] = {}
        self._rows_of: dict[int, Rows] = {}
        self._groups_at: dict[tuple[str, tuple[str, ...]], Rows] = {}
        self._odd = {name: set[str]() for name in ("failures", "cold_s", "blocked_s", "prefix")}
        self._table: Floats = np.zeros((len(_COLUMNS), 16))
        self._groups: Rows = np.zeros(16, np.intp)
        self._keys: NDArray[np.uint64] = np.zeros(16, np.uint64)
        self._cut()
        for snapshot in snapshots:
            self.put(snapshot)

    def __len__(self) -> int:
        return len(self.snapshots)

    @property
    def has_failures(self) -> bool:
        """Whether any replica has failed of late."""
        return bool(self._odd["failures"])

    @property
    def has_cold(self) -> bool:
        """Whether any replica may have to be started first."""
        return bool(self._odd["cold_s"])

    @property
    def has_blocked(self) -> bool:
        """Whether any replica takes nothing now."""
        return bool(self._odd["blocked_s"])

    @property
    def has_prefixes(self) -> bool:
        """Whether any replica reuses the beginnings of prompts."""
        return bool(self._odd["prefix"])

    def row(self, instance: str) -> int | None:
        """Return the row of an instance, if it is there."""
        return self._row_of.get(instance)

    def at(self, row: int) -> ReplicaSnapshot:
        """Return the replica of a row as it is now."""
        snapshot = self.snapshots[row]
        if snapshot.ends_in_s is None:
            return snapshot
        return replace(snapshot, ends_in_s=self.ends_in_s(row))

    def ends_in_s(self, row: int) -> float:
        """Return the seconds until the block of a row ends; infinite if that is not known."""
        return float(self.column("ends_at")[row]) - self.now

    def rows(self, group: int) -> Rows:
        """Return the rows of a group; shape (K,)."""
        rows = self._rows_of.get(group)
        if rows is None:
            rows = self._rows_of[group] = np.flatnonzero(self.group_N == group)
        return rows

    def groups_at(self, digest: str, sites: tuple[str, ...]) -> Rows:
        """Return the groups of a version at these sites, and ``num_groups`` where there is none;
        shape (S,)."""
        groups = self._groups_at.get((digest, sites))
        if groups is None:
            known = self.groups.get(digest, {})
            groups = np.array([known.get(site, self.num_groups) for site in sites], np.intp)
            if len(self._groups_at) >= MAX_SITE_LISTS:
                self._groups_at.clear()
            self._groups_at[digest, sites] = groups
        return groups

    def put(self, snapshot: ReplicaSnapshot) -> None:
        """Add a replica, or note how it is now."""
        row = self._row_of.get(snapshot.instance)
        if row is not None:
            before = self.snapshots[row]
            if (before.site, before.digest) != (snapshot.site, snapshot.digest):
                self.drop(snapshot.instance)
                row = None
        if row is None:
            row = self._add(snapshot)
        self.in_flight_of[snapshot.site] += (
            snapshot.num_in_flight - self.snapshots[row].num_in_flight
        )
        self.snapshots[row] = snapshot
        free = snapshot.state is InstanceState.READY and not snapshot.ejected
        busy, max_rows = snapshot.num_busy, snapshot.max_rows
        share = min(busy, max_rows) / max_rows
        wait = max(0, busy + 1 - max_rows) / max_rows
        prefill = snapshot.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
        decode = snapshot.decode_tokens_per_s or PRIOR_DECODE_TOKENS_PER_S
        ends_in_s = snapshot.ends_in_s
        # Stored by column in one assignment, in the order of _COLUMNS.
        self._table[:, row] = (
            snapshot.overhead_s * snapshot.correction,
            snapshot.correction / max(MIN_TOKENS_PER_S, prefill),
            snapshot.correction / max(MIN_TOKENS_PER_S, decode),
            max_rows,
            busy,
            snapshot.num_in_flight,
            share,
            wait,
            wait + share,
            snapshot.failures,
            snapshot.cold_s,
            np.inf if ends_in_s is None else self.now + ends_in_s,
            snapshot.context_tokens,
            0.0 if free else np.inf,
            snapshot.max_in_flight,
        )
        self._note("failures", snapshot.instance, snapshot.failures > 0)
        self._note("cold_s", snapshot.instance, snapshot.cold_s > 0)
        self._note("blocked_s", snapshot.instance, not free)
        self._note("prefix", snapshot.instance, snapshot.caches_prefixes)

    def drop(self, instance: str) -> None:
        """Forget a replica; the last row takes its place."""
        row = self._row_of.pop(instance)
        last = len(self.snapshots) - 1
        self.in_flight_of[self.snapshots[row].site] -= self.snapshots[row].num_in_flight
        moved = self.snapshots.pop()
        if row != last:
            self.snapshots[row] = moved
            self._row_of[moved.instance] = row
            self._table[:, row] = self._table[:, last]
            self._groups[row], self._keys[row] = self._groups[last], self._keys[last]
        for odd in self._odd.values():
            odd.discard(instance)
        self._cut()

    def affine(self, digest: str, prefix: bytes, num_rows: int) -> list[int]:
        """Return the few rows that requests with this prefix go to, by rendezvous hashing."""
        rows = self._affine.get((prefix, num_rows))
        if rows is None:
            own = np.concatenate(
                [np.array([], np.intp), *(self.rows(one) for one in self.groups[digest].values())]
            )
            drawn = self.draw(own, int.from_bytes(prefix[:8]))
            last = min(num_rows, len(own) - 1)
            few = drawn.argpartition(last)[:num_rows] if len(own) else own
            rows = own[few][drawn[few].argsort()].tolist()
            if len(self._affine) >= MAX_PREFIXES:
                self._affine.clear()
            self._affine[prefix, num_rows] = rows
        return rows

    def draw(self, rows: Rows, salt: int) -> NDArray[np.uint64]:
        """Return a number for each of these replicas that looks random; shape (K,)."""
        return (self.keys_N[rows] ^ np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)

    def _note(self, name: str, instance: str, is_so: bool) -> None:
        if is_so:
            self._odd[name].add(instance)
        else:
            self._odd[name].discard(instance)

    def _add(self, snapshot: ReplicaSnapshot) -> int:
        row = len(self.snapshots)
        if row == self._table.shape[1]:
            self._widen(2 * row)
        sites = self.groups.setdefault(snapshot.digest, {})
        if snapshot.site not in sites:
            sites[snapshot.site] = self.num_groups
            self.num_groups += 1
        self.snapshots.append(snapshot)
        self.in_flight_of[snapshot.site] += snapshot.num_in_flight
        self._row_of[snapshot.instance] = row
        self._groups[row] = sites[snapshot.site]
        self._keys[row] = int.from_bytes(
            blake2b(snapshot.instance.encode(), digest_size=8).digest()
        )
        self._cut()
        return row

    def _widen(self, capacity: int) -> None:
        more = capacity - self._table.shape[1]
        self._table = np.pad(self._table, ((0, 0), (0, more)))
        self._groups, self._keys = np.pad(self._groups, (0, more)), np.pad(self._keys, (0, more))
        self._cut()

    def _cut(self) -> None:
        """Point the columns at the rows in use, and forget what was drawn from other rows."""
        num_rows = len(self.snapshots)
        self.group_N, self.keys_N = self._groups[:num_rows], self._keys[:num_rows]
        self._columns: dict[str, Floats] = dict(
            zip(_COLUMNS, self._table[:, :num_rows], strict=True)
        )
        self._affine.clear()
        self._rows_of.clear()
        self._groups_at.clear()

    def column(self, name: str) -> Floats:
        """Return one column; shape (N,)."""
        return self._columns[name]


Replicas = Pool | Sequence[ReplicaSnapshot]


def as_pool(replicas: Replicas) -> Pool:
    """Return the replicas in columns."""
    return replicas if isinstance(replicas, Pool) else Pool(replicas)
