"""One run of a program as it goes: its values, what it changes, what it has saved.

A step's nodes are evaluated in the order in which they are written: those before the first point at
once, the others when the model comes by theirs, and all from one point on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fabric.engine.programs.cells import WHOLE, Cell, TensorCell
from fabric.engine.programs.edits import changed
from fabric.engine.programs.selection import Reach
from fabric.engine.programs.steady import IDLE, Steady, StepPlan, plain_add, simplified
from fabric.engine.programs.values import (
    DTYPES,
    MAX_VALUE_BYTES,
    Value,
    arguments,
    evaluate,
    noise,
    reduced,
    zeros,
)
from fabric.errors import FabricError, ProgramFailed, ProgramTooLarge
from fabric.messages import nodes as ops
from fabric.messages.program import ProgramRun

_TOUCHING = (ops.Read, ops.Write, ops.Project, ops.Clamp, ops.Skip)
_CHANGING = (ops.Write, ops.Project, ops.Clamp, ops.Skip)
_OF_MODEL = (ops.Norm, ops.Unembed, ops.TokenRows, ops.Module, ops.WeightRead)
_LATE = ("final.norm.out", "logits", "sample")
"""Points after the last key and value: what changes there is in no cache."""


class ModelCalls(Protocol):
    """What nodes may ask of the model itself; overlays of the run count."""

    def call(self, node: ops.Node, x: Tensor | None) -> Tensor:
        """Return what a ``model.*`` or ``weight.read`` node stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a run is given from outside: constants, and what other runs saved."""

    constants: Mapping[str, Tensor]
    saved: Callable[[str, str], Tensor]
    artifact: Callable[[ops.Artifact], Tensor]
    model: ModelCalls
    entry: Tensor | None = None
    """With what it enters the stack where it starts in the middle, [positions, hidden]."""


class Execution:
    """The state of one run. Its prompt is known: spans are positions.

    Args:
        run: With ``ids``; selectors have no spans any more.
        sources: What comes from outside.
        max_bytes: Of all its saves.
        single: Indices of the saves that act in one step only, by the static count.
        hooked: Points that can be served without asking its nodes, once they are known to do
            nothing but add and save there; none where they must be asked in every step.
    """

    def __init__(
        self,
        run: ProgramRun,
        sources: Sources,
        *,
        max_bytes: int,
        single: frozenset[int],
        hooked: frozenset[str] = frozenset(),
    ) -> None:
        self.run = run
        self.num_prompt = len(run.ids or ())
        self.num_steps = max(1, run.gen.max_tokens)
        self.told: list[int] = []
        """Tokens that were generated; a run that starts over takes them again."""
        self.seconds = 0.0
        """Of evaluating its nodes, since the last time that somebody asked."""
        self._reach = Reach(self.num_prompt, self.num_steps)
        self._sources = sources
        self._max_bytes = max_bytes
        self._single = single
        self._nodes = run.nodes
        self._args = [arguments(node) for node in run.nodes]
        self._points = [_point(node) for node in run.nodes]
        self._hooked = hooked
        self.steady: Steady | None = None
        """What every step of decoding does from now on, if that needs none of its nodes."""
        self._always: StepPlan | None = None
        """Of every step of decoding, where they are all alike."""
        self._learning = False
        """Whether this step shows what all others will be."""
        self._adds: dict[int, Tensor] = {}
        """By node that has added the same vector to a token as it would to any, the vector."""
        self._plans: dict[tuple[frozenset[int], bool], StepPlan] = {}
        self._streamed = -1
        self._to_send: list[tuple[int, dict[str, Value]]] = []
        self.restart()

    def restart(self) -> None:
        """Forget what was computed; what was told stays told."""
        self._values: dict[int, Value] = {}
        self._latched: dict[int, bool] = {}
        self._parts: dict[int, list[Value]] = {}
        self._kept: list[tuple[Tensor, int]] = []
        """What steps saved that did what ``steady`` says, and the positions of their tokens."""
        self._num_bytes = 0
        self._marked: dict[str, tuple[Tensor, int]] = {}
        self._slopes: dict[int, dict[str, Tensor]] = {}
        """By a number's node and by point, what was found in this step."""
        self._prepared = False
        self._step, self._span = 0, (0, 0)
        self._plan = IDLE
        self._fresh: set[int] = set()

    # What the scheduler asks.

    @cached_property
    def first_touched(self) -> int:
        """The first prompt position at which a node acts: from there on the prompt runs whole."""
        return 0 if self.run.start_at else self._first(_TOUCHING)

    @cached_property
    def first_read(self) -> int:
        """The first prompt position that must be computed, whatever is cached."""
        return min(self._first((ops.Read,)), self.num_prompt - 1)

    @cached_property
    def first_changed(self) -> int | None:
        """The first position whose keys and values differ from the plain model's."""
        if self.run.overlays or self.run.start_at:
            return 0
        firsts = [
            first
            for k, node in enumerate(self._nodes)
            if isinstance(node, _CHANGING) and self._points[k] not in _LATE
            if (first := self._reach.first_of(node.sel, decoding=True)) is not None
        ]
        return min(firsts, default=None)

    def num_wanted(self, start: int, count: int) -> int:
        """Return of how many of the last tokens of a chunk its nodes want logits."""
        places = (self._reach.positions(node, start, count) for node in self._asking)  # type: ignore[arg-type]
        return max((start + count - min(at) for at in places if at), default=0)

    # What a step asks.

    def begin(self, start: int, count: int) -> StepPlan:
        """Start a step over the positions ``start`` to ``start + count``; evaluate its opening."""
        self._span = start, count
        self._step = self._reach.step_of(start + count - 1)
        self._fresh = set()
        if not self._prepared:
            self._prepare()
        if self._always is not None and self._step:
            self._plan = self._always
        else:
            active = frozenset(self._active(start, count)), self._step == 0
            if active not in self._plans:
                self._plans[active] = self._plan_of(active[0])
            self._plan = self._plans[active]
            self._always = self._plan if self._step and self._is_steady else None
            self._learning = self._always is not None
        self._evaluate(self._plan.opening)
        return self._plan

    def visit(self, point: str, cell: Cell, base: int) -> None:
        """Evaluate the nodes from a point on; ``base`` is the position of the cell's first row."""
        nodes = self._plan.at[point]
        if point == self._entry:
            assert self._sources.entry is not None
            x = self._sources.entry[base : base + cell.num_rows]
            cell.put(WHOLE, x.to(cell.take(WHOLE)))
        if point not in self._wrt:
            self._evaluate(nodes, cell, base)
            return
        changing = [i for i, k in enumerate(nodes) if isinstance(self._nodes[k], _CHANGING)]
        num_before = changing[-1] + 1 if changing else 0
        self._evaluate(nodes[:num_before], cell, base)
        self._marked[point] = cell.mark(), base
        self._evaluate(nodes[num_before:], cell, base)

    def keep(self, position: int) -> Tensor:
        """Return room for what a step saves of a token, as ``steady`` lays it out.

        Raises:
            ProgramTooLarge: That is more than it may.
        """
        assert self.steady is not None
        for node, num_bytes in self.steady.sizes:
            self._count(node, num_bytes)
        room = torch.empty(self.steady.num_kept, dtype=self.steady.dtype)
        self._kept.append((room, position))
        return room

    def end(self) -> None:
        """End a step."""
        streamed = {}
        for k in sorted(self._fresh):
            node = self._nodes[k]
            if isinstance(node, ops.Save) and node.stream and self._step > self._streamed:
                streamed[node.name] = reduced(node, self._parts[k][-1])
        if streamed:
            self._to_send.append((self._step, streamed))
        self._streamed = max(self._streamed, self._step)
        if self._learning and self._hooked and self._hooked.issuperset(self._plan.at):
            self.steady = simplified(self._plan, self._nodes, self._adds, self._values)
        self._learning = False
        self._marked.clear()
        self._slopes.clear()

    def take_streamed(self) -> list[tuple[int, dict[str, Value]]]:
        """Return, once, what is to be streamed: steps and their saves by name."""
        taken, self._to_send = self._to_send, []
        return taken

    def take_seconds(self) -> float:
        """Return, once, the seconds that its nodes took."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def results(self, *, streamed: bool) -> dict[str, Value]:
        """Return the saves, joined over the steps; ``streamed`` ones only if asked for."""
        if not self._prepared:
            self._prepare()
        if self.steady is not None:
            for k, value in self.steady.unpacked(self._kept):
                self._parts.setdefault(k, []).append(value)
            self._kept = []
        results = {}
        for k, node in enumerate(self._nodes):
            if isinstance(node, ops.Save) and (streamed or not node.stream) and k in self._parts:
                joined = self._joined(k, self._parts[k])
                results[node.name] = reduced(node, joined)
        return results

    # How.

    @cached_property
    def _is_steady(self) -> bool:
        """Whether the same nodes act in all steps of decoding."""
        sels = [node.sel for node in self._nodes if isinstance(node, _TOUCHING)]
        return all(sel.steps is None and sel.pos in ("all", "last") for sel in sels)

    @cached_property
    def _asking(self) -> list[ops.Node]:
        """Nodes that want logits."""
        return [
            node
            for node, point in zip(self._nodes, self._points, strict=True)
            if point == "logits" or (isinstance(node, ops.Grad) and node.wrt == "logits")
        ]

    @cached_property
    def _dynamic(self) -> frozenset[int]:
        """Nodes whose values depend on the forward pass."""
        found: set[int] = set()
        for k, args in enumerate(self._args):
            if self._points[k] or not found.isdisjoint(args):
                found.add(k)
        return frozenset(found)

    @cached_property
    def _wrt(self) -> frozenset[str]:
        return frozenset(node.wrt for node in self._nodes if isinstance(node, ops.Grad))

    @cached_property
    def _entry(self) -> str | None:
        start = self.run.start_at
        return None if start is None else f"layers.{start.layer}.in"

    def _prepare(self) -> None:
        """Evaluate what has one value for all steps."""
        self._prepared = True
        self._evaluate([k for k in range(len(self._nodes)) if k not in self._dynamic])
        self._fresh.clear()

    def _plan_of(self, active: frozenset[int]) -> StepPlan:
        opening: list[int] = []
        at: dict[str, list[int]] = {}
        fresh: set[int] = set()
        here = opening
        for k, point in enumerate(self._points):
            if point is not None and k in active:
                here = at.setdefault(point, [])
            elif point is not None or fresh.isdisjoint(self._args[k]):
                continue
            fresh.add(k)
            here.append(k)
        for k in fresh:
            if isinstance(node := self._nodes[k], ops.Grad):
                at.setdefault(node.wrt, [])
        if self._entry and self._step == 0:
            at.setdefault(self._entry, [])
        return StepPlan(tuple(opening), {point: tuple(nodes) for point, nodes in at.items()})

    def _evaluate(self, nodes: Sequence[int], cell: Cell | None = None, base: int = 0) -> None:
        for k in nodes:
            node = self._nodes[k]
            try:
                self._evaluate_one(k, node, cell, base)
            except FabricError:
                raise
            except Exception as error:
                reason = f"{node.op}: {error}".rstrip(". ")
                raise ProgramFailed(run=self.run.id, node=k, reason=reason) from error

    def _evaluate_one(self, k: int, node: ops.Node, cell: Cell | None, base: int) -> None:
        values = self._values
        if any(ref not in values for ref in self._args[k]):
            return
        match node:
            case ops.Read():
                assert cell is not None
                place, at = self._reach.place(node, self._span, cell.num_rows, base)
                values[k] = Value(cell.take(place), at)
            case ops.Write() | ops.Project() | ops.Clamp() | ops.Skip():
                assert cell is not None
                self._change(k, node, cell, base)
                return
            case ops.Save():
                self._save(k, node)
            case _:
                values[k] = self._computed(k, node)
        self._fresh.add(k)

    def _computed(self, k: int, node: ops.Node) -> Value:
        values = self._values
        match node:
            case ops.Const(name=name):
                return Value(self._sources.constants[name])
            case ops.Zeros():
                return zeros(node)
            case ops.Noise(like=like):
                return noise(node, k, values[like])
            case ops.Saved():
                return Value(self._saved(node))
            case ops.Artifact():
                return Value(self._sources.artifact(node))
            case ops.Gate():
                return self._gate(k, node, values[node.x])
            case ops.Grad():
                return self._gradient(node, values[node.scalar].data)
            case _ if isinstance(node, _OF_MODEL):
                x = getattr(node, "x", None)
                given = None if x is None else values[x]
                made = self._sources.model.call(node, None if given is None else given.data)
                return Value(made, None if given is None else given.at)
            case _:
                return evaluate(node, [values[ref] for ref in self._args[k]])

    def _change(
        self, k: int, node: ops.Write | ops.Project | ops.Clamp | ops.Skip, cell: Cell, base: int
    ) -> None:
        place, _ = self._reach.place(node, self._span, cell.num_rows, base)
        h = cell.take(place)
        args = {
            name: self._values[ref].data
            for name in ("x", "v", "mask", "gate")
            if (ref := getattr(node, name, None)) is not None
        }
        new = changed(node, h, args)
        if new.shape != h.shape:
            reason = f"it would write {list(new.shape)} where {list(h.shape)} stands"
            raise ProgramFailed(run=self.run.id, node=k, reason=reason)
        masked = (self._points[k] or "").endswith(".scores")
        sound = ~new.isnan() if masked else new.isfinite()
        if new.dtype.is_floating_point and not bool(sound.all()):
            raise ProgramFailed(
                run=self.run.id, node=k, reason=f"what it writes at {self._points[k]} is not finite"
            )
        cell.put(place, new.to(h.dtype))
        if self._learning and isinstance(node, ops.Write) and node.x not in self._dynamic:
            vector_F = plain_add(node, args.get("x"), h)
            self._adds |= {} if vector_F is None else {k: vector_F}

    def _save(self, k: int, node: ops.Save) -> None:
        value = self._values[node.x]
        data = value.data if node.dtype is None else value.data.to(DTYPES[node.dtype])
        # What was read is a copy already, and values are never changed in place.
        read = isinstance(self._nodes[node.x], ops.Read)
        data = data.detach() if read else data.detach().clone()
        self._count(node, data.nbytes)
        self._parts.setdefault(k, []).append(Value(data, value.at))

    def _count(self, node: ops.Save, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        limit = self._max_bytes if node.reduce is None else MAX_VALUE_BYTES
        if self._num_bytes > limit:
            raise ProgramTooLarge(cap="saved bytes", value=self._num_bytes, limit=limit)

    def _joined(self, k: int, values: Sequence[Value]) -> Value:
        if k in self._single or k not in self._dynamic:
            return values[-1]
        if values[0].at is None:
            return Value(torch.stack([value.data for value in values]))
        at = tuple(position for value in values for position in value.at or ())
        return Value(torch.cat(self._padded(k, [value.data for value in values])), at)

    def _padded(self, k: int, parts: list[Tensor]) -> list[Tensor]:
        """Bring scores and patterns of several steps to the length of the longest."""
        node = self._nodes[k]
        point = self._points[node.x] if isinstance(node, ops.Save) else None
        if point is None or point.rpartition(".")[2] not in ("scores", "pattern"):
            return parts
        fill = float("-inf") if point.endswith("scores") else 0.0
        longest = max(part.shape[-1] for part in parts)
        pad = torch.nn.functional.pad
        return [pad(part, (0, longest - part.shape[-1]), value=fill) for part in parts]

    def _saved(self, node: ops.Saved) -> Tensor:
        data = self._sources.saved(node.run, node.save)
        if node.positions is not None:
            index = torch.tensor(node.positions, dtype=torch.long)
            data = data.index_select(0, torch.where(index < 0, index + data.shape[0], index))
        return data.mean(0) if node.mean else data

    def _gate(self, k: int, node: ops.Gate, value: Value) -> Value:
        x = value.data.reshape(-1) if value.data.dim() else value.data
        on = {"gt": x > node.threshold, "ge": x >= node.threshold,
              "lt": x < node.threshold, "le": x <= node.threshold}[node.cmp]  # fmt: skip
        if node.latch:
            on = on.cummax(0).values if on.dim() else on
            on = on | self._latched.get(k, False)
            self._latched[k] = bool(on.any())
        return Value(on.float(), value.at if on.dim() else None)

    def _gradient(self, node: ops.Grad, scalar: Tensor) -> Value:
        slopes = self._slopes.setdefault(node.scalar, {})
        if node.wrt not in slopes:
            slopes |= self._slopes_of(node.scalar, scalar)
        gradient, base = slopes[node.wrt], self._marked[node.wrt][1]
        place, at = self._reach.place(node, self._span, gradient.shape[0], base)
        return Value(TensorCell(gradient).take(place), at)

    def _slopes_of(self, k: int, scalar: Tensor) -> dict[str, Tensor]:
        """Return a node's gradients at all points that are asked for: one pass gives them all."""
        asked = {
            node.wrt for node in self._nodes if isinstance(node, ops.Grad) and node.scalar == k
        }
        marked = {point: self._marked[point][0] for point in asked if point in self._marked}
        found: Sequence[Tensor | None] = [None] * len(marked)
        if scalar.requires_grad:
            found = torch.autograd.grad(
                scalar, list(marked.values()), retain_graph=True, allow_unused=True
            )
        return {
            point: torch.zeros_like(x) if slope is None else slope
            for (point, x), slope in zip(marked.items(), found, strict=True)
        }

    # Where.

    def _active(self, start: int, count: int) -> list[int]:
        """Return the nodes that touch the model at one of these positions."""
        return [
            k
            for k, point in enumerate(self._points)
            if point is not None and self._reach.positions(self._nodes[k], start, count)  # type: ignore[arg-type]
        ]

    def _first(self, kinds: tuple[type, ...]) -> int:
        """Return the first prompt position at which nodes of these kinds act, or its length."""
        firsts = [
            self._reach.first_of(node.sel, decoding=False)
            for node in self._nodes
            if isinstance(node, _TOUCHING) and isinstance(node, kinds)
        ]
        return min((p for p in firsts if p is not None), default=self.num_prompt)


def _point(node: ops.Node) -> str | None:
    """Return the point at which a node acts."""
    match node:
        case ops.Read(at=at) | ops.Write(at=at) | ops.Project(at=at) | ops.Clamp(at=at):
            return at
        case ops.Skip(module=module):
            return f"{module}.out"
    return None
