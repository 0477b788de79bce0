"""The programs of one step: hooks at the points that they touch, each for its own tokens.

Nothing is hooked in a step without programs. What a program raises ends its run alone: its tokens
go on unchanged, and the step with them.

Shapes: N tokens of the step, n tokens of one run in it, W tokens whose logits are wanted,
V vocabulary, H query heads, K key-value heads, D head size, S keys of one run, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fabric.engine.attention import Scoring
from fabric.engine.programs.cells import Cell, HeadsCell, TensorCell
from fabric.engine.programs.composition import Composition
from fabric.engine.programs.execution import Execution
from fabric.engine.programs.model import RunModel, nested
from fabric.engine.programs.points import Points, Tap, flat
from fabric.engine.programs.recompute import scores_of, visible_of, weighted_of
from fabric.engine.programs.routing import Route
from fabric.engine.programs.steady import IDLE, StepPlan
from fabric.engine.programs.values import MAX_VALUE_BYTES
from fabric.engine.programs.watch import given
from fabric.engine.runner import Attend
from fabric.engine.touches import Touches
from fabric.errors import FabricError, ProgramFailed, ProgramTooLarge

if TYPE_CHECKING:
    from fabric.engine.rows import ActiveTask, Row

Keys = Callable[[int, "RunStep"], tuple[Tensor, Tensor]]
"""(layer, run) -> the run's keys and values in the cache, [S, K, D] each."""

Serve = Callable[[str, Tap, Tensor], "Tensor | None"]
"""(point, its tap, a module's tensor) -> another one where it was changed."""


_T = TypeVar("_T")


class Stopped(Exception):
    """The forward pass ends here: no run of the step goes further."""


@dataclass(slots=True, kw_only=True, eq=False)
class RunStep:
    """One run's tokens in a step.

    Args:
        execution: The run's state.
        model: The model, as the run sees it.
        begin: Where its tokens begin in the ragged row.
        count: How many there are.
        start: The position of the first.
        wanted: Where its logits begin among the wanted ones, and how many they are.
        row: Of the batch; ``None`` where it shares none.
    """

    execution: Execution
    model: RunModel
    begin: int
    count: int
    start: int
    wanted: tuple[int, int]
    row: Row | None = None
    plan: StepPlan = IDLE
    error: FabricError | None = None

    @property
    def rows(self) -> slice:
        """Its tokens in the ragged row."""
        return slice(self.begin, self.begin + self.count)

    @property
    def wanted_rows(self) -> slice:
        """Its tokens among those whose logits are wanted."""
        return slice(self.wanted[0], sum(self.wanted))

    @property
    def acts(self) -> bool:
        """Whether nodes may act on its tokens, one by one."""
        return self.start + self.count > self.execution.first_touched

    def attempt(self, action: Callable[..., _T], *args: object) -> _T | None:
        """Do something for the run; what goes wrong is kept and ends it. Its time is its own."""
        if self.error is not None:
            return None
        started = time.perf_counter()
        try:
            return action(*args)
        except FabricError as error:
            self.error = error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(". ")
            self.error = ProgramFailed(run=self.execution.run.id, reason=reason)
        finally:
            self.execution.seconds += time.perf_counter() - started
        return None


class ProgramStep:
    """The programs among the rows of a step.

    Args:
        runs: Those that have something to do.
        points: Of the model that runs.
        keys: Finds a run's keys and values.
        alone: Whether all rows of the step are among ``runs``.
        steady: By token, the rows of runs that do what they do in all steps.
        composition: What those do.
    """

    def __init__(
        self,
        runs: Sequence[RunStep],
        points: Points,
        keys: Keys,
        *,
        alone: bool = False,
        steady: Mapping[int, Row] = MappingProxyType({}),
        composition: Composition | None = None,
    ) -> None:
        self.runs = list(runs)
        self._points = points
        self._keys = keys
        self._alone = alone
        self._steady = steady
        self._composition = composition or Composition({})
        self._at: dict[str, list[RunStep]] = {}
        self._failed: dict[ActiveTask, FabricError] = {}
        self._of_row = {run.row: run for run in runs if run.row is not None}

    def begin(self) -> None:
        """Evaluate what comes before any point."""
        for run in self.runs:
            run.attempt(self._open, run)
        for token, room in self._composition.rooms.items():
            row = self._steady[token]
            assert row.active.program is not None
            try:
                room.use(row.active.program.execution.keep(row.num_cached))
            except FabricError as error:
                self._failed[row.active] = error

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Run the model inside this: its touched points are served."""
        if not self.runs:
            yield
            return
        with ExitStack() as stack:
            for module, at in self._private().items():
                stack.callback(module.register_forward_hook(self._replacing(at)).remove)
            self._hook(stack, self._at, self._serve_tap)
            for module in self._layers_below():
                stack.enter_context(_passed_by(module, as_tuple=module in self._points.tuples))
            if (last := self._last_layer()) is not None:
                stack.callback(last.register_forward_pre_hook(_stop).remove)
            with suppress(Stopped):
                yield

    @contextmanager
    def beside(self, whole: Collection[int]) -> Iterator[None]:
        """Run the model inside this, too: serves what runs do in all steps, but in these layers,
        which do it themselves."""
        if not (points := self._composition.outside(whole)):
            yield
            return
        with ExitStack() as stack:
            self._hook(stack, points, self._composition.serve)
            yield

    def touches(self) -> Mapping[int, Touches]:
        """Return what runs do in layers in all steps."""
        return self._composition.touches

    def attended(self) -> set[int]:
        """Return the layers that have points inside their attention served."""
        taps = [self._points.taps[point] for point in self._at]
        return {tap.layer for tap in taps if tap.side == "attention" and tap.layer is not None}

    def around(self, attend: Attend) -> Attend:
        """Return the attention with the points inside it served."""
        touched = self.attended()
        if not touched:
            return attend

        def served(
            layer: int,
            q_NHD: Tensor,
            k_NKD: Tensor,
            v_NKD: Tensor,
            scale: float | None,
            options: Mapping[str, object],
        ) -> Tensor:
            if layer not in touched:
                return attend(layer, q_NHD, k_NKD, v_NKD, scale, options)
            name = f"layers.{layer}.attn"
            q_NHD = self._serve(f"{name}.q_rope", q_NHD)
            k_NKD = self._serve(f"{name}.k_rope", k_NKD)
            out_NHD = attend(layer, q_NHD, k_NKD, v_NKD, scale, options)
            scoring = Scoring.of(scale, options, q_NHD.shape[2])
            out_NHD = self._score(layer, q_NHD, out_NHD, scoring)
            return self._serve(f"{name}.z", out_NHD)

        return served

    def logits(self, logits_WV: Tensor) -> Tensor:
        """Serve the logits."""
        return self._serve("logits", logits_WV, wanted=True)

    def sample(self, row: Row, token: int) -> int:
        """Serve the token that a row's step chose; return the one that it shall be."""
        assert row.active.program is not None
        told = row.active.program.execution.told
        token = told[row.position] if row.position < len(told) else token
        run = self._of_row.get(row)
        if run is None or "sample" not in run.plan.at:
            return token
        cell = TensorCell(torch.tensor([token]))
        last = run.start + run.count - 1
        run.attempt(run.execution.visit, "sample", cell, last)
        return token if cell.changed is None else int(cell.changed[0])

    def end(self) -> None:
        """End the step for its runs."""
        for run in self.runs:
            if run.acts:
                run.attempt(run.execution.end)

    def failed(self) -> dict[ActiveTask, FabricError]:
        """Return the tasks whose run failed, with its error."""
        return self._failed | {
            run.row.active: run.error
            for run in self.runs
            if run.row is not None and run.error is not None
        }

    def _open(self, run: RunStep) -> None:
        if not run.acts:
            return
        run.plan = run.execution.begin(run.start, run.count)
        for point in run.plan.at:
            self._at.setdefault(point, []).append(run)

    def _visit(self, run: RunStep, point: str, cell: Cell, base: int) -> None:
        run.attempt(run.execution.visit, point, cell, base)

    def _serve(self, point: str, x_NX: Tensor, *, wanted: bool = False) -> Tensor:
        """Let the runs see their tokens at a point; return it with what they changed."""
        result = x_NX
        for run in self._at.get(point, ()):
            rows = run.wanted_rows if wanted else run.rows
            cell = TensorCell(x_NX[rows])
            self._visit(run, point, cell, run.start + run.count - cell.num_rows)
            if cell.changed is not None and run.error is None:
                result = x_NX.clone() if result is x_NX else result
                result[rows] = cell.changed
        return result

    def _serve_tap(self, point: str, tap: Tap, x: Tensor) -> Tensor | None:
        """Serve a point of a module's tensor; return another one where it was changed."""
        result: Tensor | None = x if tap.shared else None
        for run in self._at[point]:
            x_NF = flat(x if result is None else result)
            cell = TensorCell(tap.view(x_NF[run.rows]))
            self._visit(run, point, cell, run.start)
            if cell.changed is None or run.error is not None:
                continue
            if result is None:
                result = x.clone()
            tap.view(flat(result)[run.rows]).copy_(cell.changed)
        return None if tap.shared else result

    def _hook(self, stack: ExitStack, points: Iterable[str], serve: Serve) -> None:
        """Have the points of modules served as long as the stack lasts."""
        by_module: dict[tuple[nn.Module, str], list[tuple[str, Tap]]] = {}
        for point in points:
            tap = self._points.taps[point]
            if tap.module is not None:
                by_module.setdefault((tap.module, tap.side), []).append((point, tap))
        for (module, side), served in by_module.items():
            handle = (
                module.register_forward_pre_hook(_entering(served, serve), with_kwargs=True)
                if side == "in"
                else module.register_forward_hook(self._leaving(served, serve))
            )
            stack.callback(handle.remove)

    def _leaving(self, served: Sequence[tuple[str, Tap]], serve: Serve) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> object:
            if nested():
                return None
            parts = list(output) if isinstance(output, tuple) else [output]
            before = list(parts)
            for point, tap in served:
                x = parts[tap.item]
                assert isinstance(x, Tensor)
                if point.endswith(".head_out"):
                    parts[0] = self._serve_heads(point, tap, module, args[0], x)
                else:
                    parts[tap.item] = _or(serve(point, tap, x), x)
                if tap.route is not None and parts[0] is not x:
                    self._route(point, tap.route, parts)
            if all(part is old for part, old in zip(parts, before, strict=True)):
                return None
            return tuple(parts) if isinstance(output, tuple) else parts[0]

        return hook

    def _route(self, point: str, route: Route, parts: list[object]) -> None:
        """Let the runs that changed a router's logits have the experts that follow from them."""
        logits_NE, *chosen = (part for part in parts if isinstance(part, Tensor))
        parts[1:] = [part.clone() for part in chosen]
        for run in self._at[point]:
            own = run.attempt(route, logits_NE[run.rows])
            for part, new in zip(parts[1:], own or (), strict=False):
                assert isinstance(part, Tensor)
                part[run.rows] = new

    def _serve_heads(self, point: str, tap: Tap, module: nn.Module, z: Tensor, y: Tensor) -> Tensor:
        result = y
        for run in self._at[point]:
            z_nHD = tap.view(flat(z)[run.rows])
            cell = HeadsCell(z_nHD, partial(run.model.apply, module))
            self._visit(run, point, cell, run.start)
            if cell.delta_nO is not None and run.error is None:
                result = y.clone() if result is y else result
                own_nO = flat(result)[run.rows]
                flat(result)[run.rows] = own_nO + cell.delta_nO
        return result

    def _score(self, layer: int, q_NHD: Tensor, out_NHD: Tensor, scoring: Scoring) -> Tensor:
        """Compute again what fused attention never writes down, for the runs that ask for it."""
        points = [f"layers.{layer}.attn.{name}" for name in ("scores", "pattern")]
        runs = {run: None for point in points for run in self._at.get(point, ())}
        result = out_NHD
        for run in runs:
            own_nHD = run.attempt(self._scored, layer, run, points, q_NHD[run.rows], scoring)
            if own_nHD is not None:
                result = out_NHD.clone() if result is out_NHD else result
                result[run.rows] = own_nHD
        return result

    def _scored(
        self, layer: int, run: RunStep, points: list[str], q_nHD: Tensor, scoring: Scoring
    ) -> Tensor | None:
        """Return the run's attention where it changed the scores or the pattern."""
        num_keys = run.start + run.count
        size = 4 * run.count * q_nHD.shape[1] * num_keys
        if size > MAX_VALUE_BYTES:
            raise ProgramTooLarge(cap="attention scores, bytes", value=size, limit=MAX_VALUE_BYTES)
        k_SKD, v_SKD = self._keys(layer, run)
        visible_nS = visible_of(run.start, run.count, scoring.window)[:, None]
        scores_nHS = scores_of(q_nHD, k_SKD, scoring).masked_fill(~visible_nS, float("-inf"))
        changed = False
        for point in points:
            x_nHS = scores_nHS if point.endswith("scores") else torch.softmax(scores_nHS, -1)
            if run in self._at.get(point, ()):
                cell = TensorCell(x_nHS)
                run.execution.visit(point, cell, run.start)
                if cell.changed is not None:
                    changed, x_nHS = True, cell.changed
            if point.endswith("scores"):
                scores_nHS = x_nHS.masked_fill(~visible_nS, float("-inf"))
            else:
                pattern_nHS = x_nHS
        return weighted_of(pattern_nHS, v_SKD) if changed else None

    def _private(self) -> dict[nn.Module, list[RunStep]]:
        """Return the modules of which runs have weights of their own."""
        found: dict[nn.Module, list[RunStep]] = {}
        for run in self.runs:
            for module in run.model.private:
                found.setdefault(module, []).append(run)
        return found

    def _replacing(self, runs: Sequence[RunStep]) -> Callable[..., object]:
        head = None if self._points.anatomy is None else self._points.anatomy.head

        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> object:
            if nested():
                return None
            parts = list(output) if isinstance(output, tuple) else [output]
            parts = [part.clone() if isinstance(part, Tensor) else part for part in parts]
            for run in runs:
                rows = run.wanted_rows if module is head else run.rows
                own = run.attempt(
                    run.model.private_call, module, [_cut(module, arg, rows) for arg in args]
                )
                for part, new in zip(parts, _parts_of(own), strict=False):
                    if isinstance(part, Tensor) and isinstance(new, Tensor):
                        flat(part)[rows] = flat(new)
            return tuple(parts) if isinstance(output, tuple) else parts[0]

        return hook

    def _layers_below(self) -> list[nn.Module]:
        """Return the layers that nobody needs: all runs of the step enter above them."""
        starts = [run.execution.run.start_at for run in self.runs]
        anatomy = self._points.anatomy
        if not self._alone or anatomy is None or any(start is None for start in starts):
            return []
        first = min(start.layer for start in starts if start is not None)
        return [parts.layer for parts in anatomy.layers[:first]]

    def _last_layer(self) -> nn.Module | None:
        """Return the layer before which the step may end: no run of it goes further."""
        ends = [run.execution.run.stop_at for run in self.runs]
        anatomy = self._points.anatomy
        if not self._alone or anatomy is None or any(end is None for end in ends):
            return None
        last = max(end for end in ends if end is not None)
        return anatomy.layers[last].layer if last < len(anatomy.layers) else None


def _entering(served: Sequence[tuple[str, Tap]], serve: Serve) -> Callable[..., object]:
    def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if nested():
            return None
        x = given(args, kwargs)
        before = x
        for point, tap in served:
            x = _or(serve(point, tap, x), x)
        if x is before:
            return None
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook


@contextmanager
def _passed_by(layer: nn.Module, *, as_tuple: bool) -> Iterator[None]:
    """Let a layer give what it is given."""

    def forward(*args: object, **kwargs: object) -> object:
        x = given(args, kwargs)
        return (x,) if as_tuple else x

    layer.__dict__["forward"] = forward  # before the class's, which hooks go around all the same
    try:
        yield
    finally:
        del layer.__dict__["forward"]


def _stop(*_: object) -> None:
    if not nested():
        raise Stopped


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _cut(module: nn.Module, arg: object, rows: slice) -> object:
    """Return a run's part of what a module is called with."""
    if not isinstance(arg, Tensor):
        return arg
    batched = arg.dim() > 2 or isinstance(module, nn.Embedding)
    return arg[:, rows] if batched else arg[rows]


def _parts_of(output: object) -> list[object]:
    return list(output) if isinstance(output, tuple) else [output]
