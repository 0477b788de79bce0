"""One run, node by node: what each gives, costs and needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fabric.errors import PointRefused, PointUnknown, ProgramError, ProgramInvalid
from fabric.messages import nodes as n
from fabric.messages.points import Lane, PointManifest
from fabric.messages.program import LowRank, ProgramRun, Scaled
from fabric.programs import model_ops
from fabric.programs.access import Place, Points, change, read, value_at
from fabric.programs.caps import ProgramCaps
from fabric.programs.checked import CheckedNode, CheckedRun, Scope
from fabric.programs.constants import ITEM_BYTES, TensorSpec
from fabric.programs.costs import einsum_intermediate, forward_flops, node_flops
from fabric.programs.pure import infer, needs_float
from fabric.programs.references import references
from fabric.programs.saves import Joined, join_steps
from fabric.programs.selection import Extent
from fabric.programs.shapes import (
    FLOATS,
    Shape,
    Unfit,
    Value,
    as_source,
    check_size,
    join,
    number,
    numbers,
    told,
    unknown,
)

Saves = Mapping[tuple[str, str], Joined]
"""By run and name."""
_CHANGES = (n.Write, n.Project, n.Clamp, n.Skip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run is checked against, the same for all runs of a program."""

    manifest: PointManifest
    constants: Mapping[str, TensorSpec]
    artifacts: Mapping[str, TensorSpec]
    caps: ProgramCaps


@dataclass(slots=True)
class RunCheck:
    """Checks one run, whose dependencies are checked.

    After ``check``, ``saves`` has what it saves and ``scopes`` what it needs.
    """

    run: ProgramRun
    around: Surroundings
    others: Saves
    depends_on: tuple[str, ...]
    saves: dict[str, Joined] = field(default_factory=dict)
    scopes: set[Scope] = field(default_factory=set)
    _extent: Extent = field(init=False)
    _points: Points = field(init=False)
    _values: list[Value | None] = field(default_factory=list)
    _nodes: list[CheckedNode] = field(default_factory=list)
    _num_flops: int = 0
    _working_bytes: int = 0
    _affects_prefill: bool = False
    _earliest: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._extent = Extent.of(self.run, self.around.manifest.context_tokens)
        self._points = Points(self.around.manifest, self.run, self._extent)

    def check(self) -> CheckedRun:
        """Return the run as it is known now.

        Raises:
            ProgramError: Something of it is not valid, or too large.
        """
        try:
            self._check_prompt()
            self._check_overlays()
            self._check_part_of_stack()
        except Unfit as error:
            raise ProgramInvalid(run=self.run.id, reason=str(error)) from None
        for index, node in enumerate(self.run.nodes):
            try:
                self._check_node(node)
            except Unfit as error:
                raise ProgramInvalid(run=self.run.id, node=index, reason=str(error)) from None
            except (PointRefused, PointUnknown) as error:
                raise _located(error, self.run.id, index) from None
        return CheckedRun(
            run=self.run,
            depends_on=self.depends_on,
            nodes=tuple(self._nodes),
            affects_prefill=self._affects_prefill,
            earliest_read=_earliest_of(self._earliest),
            num_flops=self._num_flops + forward_flops(self.around.manifest, self.run, self._extent),
            result_bytes=sum(save.num_bytes for save in self.saves.values()),
        )

    def _check_prompt(self) -> None:
        manifest, extent = self.around.manifest, self._extent
        if self.run.ids is not None:
            model_ops.needs_ids_in_vocabulary(self.run.ids, manifest)
        least = (extent.prompt if extent.exact else 1) + self.run.gen.max_tokens
        if least > manifest.context_tokens:
            raise Unfit(
                f"it needs {least} tokens and the model's context has {manifest.context_tokens}"
            )

    def _check_overlays(self) -> None:
        for overlay in self.run.overlays:
            model_ops.needs_overlay_that_fits(self.around.manifest, overlay, self.around.constants)
            self.scopes.add("weights")
            self._affects_prefill = True

    def _check_part_of_stack(self) -> None:
        start, stop, gen = self.run.start_at, self.run.stop_at, self.run.gen
        layers = self.around.manifest.num_layers
        if stop is not None:
            if stop > layers or (start is not None and stop <= start.layer):
                raise Unfit(f"it cannot stop at layer {stop} of {layers}")
            if gen.max_tokens > 0:
                raise Unfit("a run that stops inside the stack generates nothing: max_tokens is 0")
        if start is None:
            return
        self.scopes.add("write")
        self._affects_prefill = True
        if start.layer >= layers:
            raise Unfit(f"it cannot start at layer {start.layer} of {layers}")
        if gen.max_tokens > 1:
            raise Unfit("a run that starts inside the stack generates one token at most")
        shape, dtype = self._start_value(start.x)
        prompt = (
            number(self._extent.prompt)
            if self._extent.exact
            else unknown("T[prompt]", self._extent.prompt)
        )
        fits = len(shape) == 2 and join(shape[0], prompt) is not None
        if not fits or shape[1].size != self.around.manifest.hidden or dtype not in FLOATS:
            raise Unfit(
                f"{start.x!r} is {told(shape)} of {dtype}; a run starts with a float"
                f" {told((prompt, number(self.around.manifest.hidden)))}"
            )

    def _start_value(self, name: str) -> tuple[Shape, str]:
        if name in self.around.constants:
            spec = self.around.constants[name]
            return numbers(spec.shape), spec.dtype
        for (run, save), joined in self.others.items():
            if f"{run}/{save}" == name and not joined.streamed:
                return as_source(joined.shape, run), joined.dtype
        raise Unfit(f"{name!r} is neither a constant nor run/save of another run")

    def _check_node(self, node: n.Node) -> None:
        args = {name: self._value(name, index) for name, index in references(node).items()}
        value: Value | None = None
        place: Place | None = None
        lane: Lane = "graph"
        saved: Joined | None = None
        steps = 1
        match node:
            case n.Read():
                self.scopes.add("read")
                value, place = read(self._points, node)
                if place.selected.earliest is not None:
                    self._earliest.append(place.selected.earliest)
            case n.Write() | n.Project() | n.Clamp() | n.Skip():
                self.scopes.add("write")
                place, acts = change(self._points, node, args)
                self._affects_prefill |= bool(acts & 1)
                steps = acts.bit_count()
            case n.Grad():
                self.scopes.add("gradient")
                value, lane = self._gradient(node, args["scalar"]), "autograd"
                self._earliest.append(0)
            case n.Norm() | n.Unembed() | n.Module():
                self.scopes.add("read")
                value = model_ops.of_hidden(self.around.manifest, node, args["x"])
                lane = "eager" if isinstance(node, n.Module) else "boundary"
            case n.TokenRows():
                self.scopes.add("read")
                value, lane = model_ops.token_rows(self.around.manifest, node), "boundary"
            case n.WeightRead():
                self.scopes.add("weights")
                value = model_ops.weight_read(self.around.manifest, node)
            case n.Const() | n.Zeros() | n.Saved() | n.Artifact():
                value = self._source(node)
            case n.Save():
                saved = self._save(node, args["x"])
            case _:
                value = infer(node, tuple(args.values()))
        lane = place.spec.lane if place is not None else lane
        self._keep(node, tuple(args.values()), value)
        self._nodes.append(_told_node(node, value, place, saved, lane, steps, args))

    def _value(self, name: str, index: int) -> Value:
        if index >= len(self._values):
            raise Unfit(f"{name} refers to node {index}, which does not come before it")
        value = self._values[index]
        if value is None:
            op = self.run.nodes[index].op
            raise Unfit(f"{name} refers to node {index}, a {op}, which gives no value")
        return value

    def _keep(self, node: n.Node, args: tuple[Value, ...], value: Value | None) -> None:
        self._values.append(value)
        self._num_flops += node_flops(self.around.manifest, node, args, value)
        if isinstance(node, n.Einsum):
            self.around.caps.hold("value_bytes", 4 * einsum_intermediate(node, args))
        if value is not None:
            num_bytes = value.most * ITEM_BYTES.get(value.dtype, 4)
            self.around.caps.hold("value_bytes", num_bytes)
            self._working_bytes += num_bytes
            self.around.caps.hold("working_bytes", self._working_bytes)

    def _gradient(self, node: n.Grad, scalar: Value) -> Value:
        if self.run.gen.max_tokens > 0:
            raise Unfit("gradients are of the prompt alone: max_tokens is 0 in a run that asks any")
        needs_float("grad", scalar)
        if scalar.shape:
            raise Unfit(f"grad takes a single number and was given {told(scalar.shape)}")
        if scalar.from_gradient:
            raise Unfit("a gradient of a gradient is not served")
        place = self._points.place(node.wrt, node.sel, "read")
        if scalar.reach < place.order:
            raise Unfit(f"its scalar depends on nothing read at or after {node.wrt!r}")
        value = value_at(place)
        if value.dtype not in FLOATS:
            raise Unfit(f"{node.wrt!r} has the dtype {value.dtype} and no gradient")
        return Value(
            shape=value.shape,
            dtype=value.dtype,
            steps=value.steps,
            positions=value.positions,
            from_gradient=True,
        )

    def _source(self, node: n.Const | n.Zeros | n.Saved | n.Artifact) -> Value:
        match node:
            case n.Const():
                spec = model_ops.constant(self.around.constants, node.name)
                return Value(shape=numbers(spec.shape), dtype=spec.dtype)
            case n.Zeros():
                return Value(shape=check_size(numbers(node.shape)), dtype="float32")
            case n.Artifact():
                key = f"{node.id}/{node.run}/{node.save}"
                if key not in self.around.artifacts:
                    raise Unfit(f"the artifact {key} is not there, or not yours")
                spec = self.around.artifacts[key]
                return Value(shape=numbers(spec.shape), dtype=spec.dtype)
            case n.Saved():
                return self._saved(node)

    def _saved(self, node: n.Saved) -> Value:
        joined = self.others.get((node.run, node.save))
        if joined is None:
            raise Unfit(f"the run {node.run!r} saves no {node.save!r}")
        if joined.streamed:
            raise Unfit(f"{node.save!r} of the run {node.run!r} is streamed, so nothing is kept")
        shape = as_source(joined.shape, node.run)
        if (node.positions is not None or node.mean) and not shape:
            raise Unfit(f"{node.save!r} of the run {node.run!r} is a single number")
        if node.positions is not None:
            if not node.positions:
                raise Unfit("its list of positions is empty")
            for index in (min(node.positions), max(node.positions)):
                if not -shape[0].most <= index < shape[0].most:
                    raise Unfit(f"position {index} is not among the {shape[0].size} of the save")
            shape = (number(len(node.positions)), *shape[1:])
        if node.mean:
            if joined.dtype not in FLOATS:
                raise Unfit(f"the mean of {joined.dtype} is not defined")
            shape = shape[1:]
        return Value(shape=shape, dtype=joined.dtype)

    def _save(self, node: n.Save, value: Value) -> Joined:
        if node.name in self.saves:
            raise Unfit(f"the run saves {node.name!r} twice")
        source = self.run.nodes[node.x]
        saved = join_steps(node, value, self._extent, is_read=isinstance(source, n.Read))
        self.saves[node.name] = saved
        return saved

    @property
    def overlay_lane(self) -> Lane:
        """What the run's overlays need: what does not factor gets a private copy of its weight."""
        if not self.run.overlays:
            return "graph"
        factors = all(isinstance(overlay, LowRank | Scaled) for overlay in self.run.overlays)
        return "boundary" if factors else "autograd"


def _told_node(
    node: n.Node,
    value: Value | None,
    place: Place | None,
    saved: Joined | None,
    lane: Lane,
    steps: int,
    args: Mapping[str, Value],
) -> CheckedNode:
    shape: Shape = ()
    dtype, positions = "", False
    if value is not None:
        shape, dtype, positions = value.shape, value.dtype, value.positions
        steps = value.num_steps
    elif saved is not None:
        shape, dtype, positions = saved.shape, saved.dtype, saved.positions
        steps = args["x"].num_steps
    elif place is not None:
        shape, dtype = place.shape, place.spec.dtype
        positions = place.spec.shape[:1] == ("T",)
    return CheckedNode(
        op=node.op,
        shape=tuple(axis.size for axis in shape),
        dtype=dtype,
        lane=lane,
        num_steps=steps,
        positions=positions,
    )


def _earliest_of(positions: list[int]) -> int | None:
    if not positions:
        return None
    if min(positions) < 0 <= max(positions):
        return 0
    return min(positions)


def _located(error: PointRefused | PointUnknown, run: str, node: int) -> ProgramError:
    point, reason = str(error.detail["point"]), str(error.detail["reason"])
    if isinstance(error, PointUnknown):
        return PointUnknown(point=point, reason=reason, run=run, node=node)
    access = str(error.detail["access"])
    return PointRefused(point=point, access=access, reason=reason, run=run, node=node)
