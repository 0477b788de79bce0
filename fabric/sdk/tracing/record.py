"""What one run records: its nodes, and the order in which they are sent.

Lines are traced in any order. A forward pass comes by its points in one order, so the nodes that
touch the model are sorted by their points; at one point they keep the order of the lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from fabric.messages.nodes import Clamp, Node, Project, Read, Save, Skip, Write
from fabric.messages.wire import Wire
from fabric.sdk.tracing.lines import Line, here

Order = Callable[[str], int]
"""When the forward pass comes by a point."""

_REFS = ("x", "y", "gate", "mask", "v", "like", "weight", "bias", "cond", "by", "scalar")
_EFFECTS = (Write, Project, Clamp, Skip, Save)
_TOUCHES = (Read, Write, Project, Clamp, Skip)


@dataclass(slots=True)
class Recorder:
    """The nodes of a run in the order of the lines that made them."""

    nodes: list[Any] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)
    _writes: dict[str, int] = field(default_factory=dict)
    _closed: bool = False

    def add(self, kind: type[Wire], **fields: object) -> int:
        """Record a node and return its index; what was computed already is not computed again.

        Raises:
            TraceError: A field is out of its bounds.
        """
        line = here()
        if self._closed:
            raise line.error("The trace is over; compute with `.value`, which is a numpy array.")
        try:
            node = kind(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise line.error(f"{where or kind.__name__}: {first['msg']}.") from None
        if isinstance(node, Write | Project | Clamp):
            self._writes[node.at] = len(self.nodes)
        elif isinstance(node, Skip):
            # A skipped module's output has other values from here on, and so have its inner points.
            self._known.clear()
        if isinstance(node, _EFFECTS):
            return self._append(node, line)
        key = (repr(node), self._writes.get(node.at) if isinstance(node, Read) else None)
        if key not in self._known:
            self._known[key] = self._append(node, line)
        return self._known[key]

    def close(self) -> None:
        """Record nothing more: what is written now is a mistake."""
        self._closed = True

    def compile(self, order: Order) -> tuple[tuple[Node, ...], tuple[Line, ...]]:
        """Return the nodes as they are sent, and the line of each; unused ones are left out.

        Raises:
            TraceError: A line needs what the same forward pass only computes later.
        """
        kept = self._live()
        sequence = _sort(kept, self, order)
        places = {old: new for new, old in enumerate(sequence)}
        nodes = tuple(_renumber(self.nodes[old], places) for old in sequence)
        return nodes, tuple(self.lines[old] for old in sequence)

    def _append(self, node: object, line: Line) -> int:
        self.nodes.append(node)
        self.lines.append(line)
        return len(self.nodes) - 1

    def _live(self) -> list[int]:
        live = {at for at, node in enumerate(self.nodes) if isinstance(node, _EFFECTS)}
        for at in range(len(self.nodes) - 1, -1, -1):
            if at in live:
                live.update(refs(self.nodes[at]))
        return sorted(live)


def refs(node: object) -> Iterator[int]:
    """Yield the nodes that a node refers to."""
    for name in _REFS:
        found = getattr(node, name, None)
        if type(found) is int:
            yield found
    yield from getattr(node, "args", ())


def _renumber(node: Any, places: Mapping[int, int]) -> Any:
    changes: dict[str, object] = {
        name: places[found] for name in _REFS if type(found := getattr(node, name, None)) is int
    }
    if args := getattr(node, "args", ()):
        changes["args"] = tuple(places[arg] for arg in args)
    return node.model_copy(update=changes) if changes else node


def _sort(kept: list[int], record: Recorder, order: Order) -> list[int]:
    """Return the kept nodes so that each stands behind what it needs, and points in their order.

    Nodes of different steps are in no order to each other: a write in step 3 may use what was read
    anywhere in step 2.
    """
    behind: dict[int, set[int]] = {at: set(refs(record.nodes[at])) for at in kept}
    touching = [at for at in kept if isinstance(record.nodes[at], _TOUCHES)]
    ranks = {at: order(_point(record.nodes[at])) for at in touching}
    spans = {at: _steps(record.nodes[at].sel) for at in touching}
    for begin in sorted({begin for begin, _ in spans.values()}):
        together = [at for at in touching if spans[at][0] <= begin < spans[at][1]]
        for first, second in pairwise(sorted(together, key=ranks.__getitem__)):
            behind[second].add(first)
    ahead: dict[int, list[int]] = {at: [] for at in kept}
    for at, needed in behind.items():
        for one in needed:
            ahead[one].append(at)
    waiting = {at: len(needed) for at, needed in behind.items()}
    ready = [at for at, count in waiting.items() if not count]
    heapify(ready)
    done: list[int] = []
    while ready:
        done.append(at := heappop(ready))
        for following in ahead[at]:
            waiting[following] -= 1
            if not waiting[following]:
                heappush(ready, following)
    if len(done) < len(kept):
        raise _too_early(record, ranks, set(kept) - set(done))
    return done


def _too_early(record: Recorder, ranks: Mapping[int, int], left: set[int]) -> Exception:
    """Return the error of the earliest point that needs something of a later one."""
    for at in sorted((at for at in left if at in ranks), key=lambda at: ranks[at]):
        needs, todo = set[int](), list(refs(record.nodes[at]))
        while todo:
            one = todo.pop()
            needs.add(one)
            todo.extend(refs(record.nodes[one]))
        for one in needs & ranks.keys():
            if ranks[one] > ranks[at]:
                return record.lines[at].error(
                    f"{_point(record.nodes[at])} is changed by a value of"
                    f" {_point(record.nodes[one])}, which the same forward pass comes by later."
                    " Take that value from another run of the session, or keep everything apart by"
                    " steps: `with t.prefill():` here, `with t.decode():` there."
                )
    return record.lines[min(left)].error("These values need each other; break the circle.")


def _point(node: Any) -> str:
    return f"{node.module}.out" if isinstance(node, Skip) else str(node.at)


def _steps(sel: Any) -> tuple[float, float]:
    begin, end = sel.steps or (0, float("inf"))
    if sel.phase == "prefill":
        return 0, min(end, 1)
    return (max(begin, 1), end) if sel.phase == "decode" else (begin, end)
