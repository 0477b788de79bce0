"""Nodes that touch the model at its points: what they read, and whether what they write fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fabric.errors import PointRefused
from fabric.messages import nodes as n
from fabric.messages.points import PointManifest, PointSpec
from fabric.messages.program import ProgramRun
from fabric.programs.points import MODULES, layer_of, order_of, resolve
from fabric.programs.pure import needs_float, one_a_token
from fabric.programs.selection import Extent, Selected, last_of_each, select
from fabric.programs.shapes import (
    Axis,
    Shape,
    Unfit,
    Value,
    join,
    needs_to_fit,
    number,
    told,
)

SAMPLE = "sample"
Changing = n.Write | n.Project | n.Clamp | n.Skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A selection at a point: where a node acts.

    Args:
        spec: What the manifest says of the point.
        order: The point's position in the forward pass.
        shape: Of what is selected, in one step.
        selected: The steps and positions.
    """

    spec: PointSpec
    order: int
    shape: Shape
    selected: Selected


@dataclass(slots=True)
class Points:
    """The points of a model as one run may touch them, in order."""

    manifest: PointManifest
    run: ProgramRun
    extent: Extent
    _known: dict[str, tuple[PointSpec, int]] = field(default_factory=dict)
    _touched: dict[int, int] = field(default_factory=dict)
    _last: int = -1

    def place(self, point: str, sel: n.Selector, access: str) -> Place:
        """Return where a node acts that reads, or writes, a selection of a point.

        Raises:
            PointUnknown: There is no such point.
            PointRefused: It cannot be read, or written.
            Unfit: It is not run, or the selector selects what it does not have.
        """
        spec, order = self.known(point)
        if not (spec.read if access == "read" else spec.write):
            reason = spec.reason or f"it cannot be {access}"
            raise PointRefused(point=point, access=access, reason=reason.rstrip("."))
        self._needs_run(point, order)
        selected = (last_of_each if point == SAMPLE else select)(sel, self.extent)
        return Place(
            spec=spec,
            order=order,
            shape=_of_selection(spec, sel, selected),
            selected=selected,
        )

    def known(self, point: str) -> tuple[PointSpec, int]:
        """Return what the manifest says of a point, and its order.

        Raises:
            PointUnknown: There is no such point.
        """
        if point not in self._known:
            spec = resolve(self.manifest, point)
            self._known[point] = spec, order_of(self.manifest, point)
        return self._known[point]

    def touch(self, place: Place, steps: int) -> None:
        """Hold a node that acts in these steps to the order of the forward pass.

        Raises:
            Unfit: A node before it acts at a later point in one of its steps.
        """
        if place.order < self._last:
            for others, order in self._touched.items():
                if order > place.order and others & steps:
                    raise Unfit(
                        f"{place.spec.pattern!r} comes before the point of a node before it; within"
                        " a step, nodes stand in the order of the forward pass"
                    )
        self._last = max(self._last, place.order)
        self._touched[steps] = max(place.order, self._touched.get(steps, -1))

    def _needs_run(self, point: str, order: int) -> None:
        start, stop = self.run.start_at, self.run.stop_at
        if start is not None and order < self._entry(start.layer):
            raise Unfit(f"{point!r} comes before layer {start.layer}, where the run starts")
        if stop is not None and order >= self._entry(stop):
            raise Unfit(f"{point!r} is not reached: the run stops at layer {stop}")
        if point == SAMPLE and self.run.gen.max_tokens == 0:
            raise Unfit("nothing is sampled in a run that generates no token; set max_tokens")

    def _entry(self, layer: int) -> int:
        firsts = [spec for spec in self.manifest.points if spec.layers]
        before = self.manifest.points.index(firsts[0]) if firsts else 0
        return before + layer * len(firsts)


def read(points: Points, node: n.Read) -> tuple[Value, Place]:
    """Return what a read gives, and where.

    Raises:
        ProgramError: The point cannot be read.
        Unfit: The selector does not fit, or the node is out of order.
    """
    place = points.place(node.at, node.sel, "read")
    points.touch(place, place.selected.steps)
    return value_at(place), place


def value_at(place: Place) -> Value:
    """Return the value at a place."""
    return Value(
        shape=place.shape,
        dtype=place.spec.dtype,
        steps=place.selected.steps,
        positions=place.spec.shape[:1] == ("T",),
        reach=place.order,
    )


def change(points: Points, node: Changing, args: Mapping[str, Value]) -> tuple[Place, int]:
    """Return where a node changes the model, and the steps, as bits, in which it does.

    Raises:
        ProgramError: The point cannot be written.
        Unfit: What it writes does not fit, is not there yet, or comes of a gradient.
    """
    if isinstance(node, n.Skip):
        place = points.place(_output_of(node), node.sel, "write")
    else:
        place = points.place(node.at, node.sel, "write")
    steps = place.selected.steps
    for name, arg in args.items():
        if arg.from_gradient:
            raise Unfit(f"{name} comes of a gradient, which is there only after the forward pass")
        steps = steps >> arg.first_step << arg.first_step
    if not steps:
        raise Unfit("what it takes has no value yet in any of the steps it selects")
    _needs_values_that_fit(node, args, place)
    points.touch(place, steps)
    return place, steps


def _needs_values_that_fit(node: Changing, args: Mapping[str, Value], place: Place) -> None:
    if "gate" in args:
        gate = one_a_token("gate", args["gate"])
        needs_to_fit("gate", (gate,), place.shape[:1] or (number(1),))
    if place.spec.dtype == "int64":
        if (
            not isinstance(node, n.Write)
            or node.mode != "set"
            or set(args) != {"x"}
            or node.alpha != 1
        ):
            raise Unfit(f"tokens at {place.spec.pattern!r} can be set, and nothing else")
        if args["x"].dtype != "int64":
            raise Unfit(f"tokens are int64 and x is {args['x'].dtype}")
    elif "x" in args:
        needs_float("x", args["x"])
    for name in ("x", "mask"):
        if name in args:
            needs_to_fit(name, args[name].shape, place.shape)
    match node:
        case n.Project() | n.Clamp():
            v = args["v"]
            needs_float("v", v)
            if not v.shape or join(v.shape[-1], place.shape[-1]) is None:
                raise Unfit(f"v has the shape {told(v.shape)}, not the axis of {told(place.shape)}")
            needs_to_fit("v", v.shape, place.shape)
    if isinstance(node, n.Clamp) and node.lo > node.hi:
        raise Unfit(f"lo {node.lo} is over hi {node.hi}")


def _output_of(node: n.Skip) -> str:
    if not MODULES.fullmatch(node.module):
        raise Unfit(f"{node.module!r} is no module: name layers.i, layers.i.attn or layers.i.mlp")
    if node.sel.heads is not None or node.sel.dims is not None:
        raise Unfit("a module is skipped as a whole: leave out heads and dims")
    return f"{node.module}.out"


def _of_selection(spec: PointSpec, sel: n.Selector, selected: Selected) -> Shape:
    axes: list[Axis] = []
    for size in spec.shape:
        match size:
            case "T":
                axes.append(selected.positions)
            case "S":
                axes.append(selected.keys)
            case int():
                axes.append(number(size))
    if sel.heads is not None:
        if ".attn." not in spec.pattern or len(axes) != 3:
            raise Unfit(f"{spec.pattern!r} has no heads")
        axes[1] = _chosen("heads", sel.heads, axes[1])
    if sel.dims is not None:
        if len(axes) < 2 or not isinstance(axes[-1].size, int):
            raise Unfit(f"{spec.pattern!r} has no dims to choose from")
        axes[-1] = _chosen("dims", sel.dims, axes[-1])
    return tuple(axes)


def _chosen(what: str, indices: tuple[int, ...], axis: Axis) -> Axis:
    if not indices or len(set(indices)) != len(indices):
        raise Unfit(f"{what} must name some, each once")
    if max(indices) >= axis.most:
        raise Unfit(f"{what} {max(indices)} is not one of the {axis.most} there are")
    return number(len(indices))


def in_layers(manifest: PointManifest, name: str) -> None:
    """Raise Unfit where a module's name has a layer that the model does not have."""
    layer = layer_of(name)
    if layer is not None and layer >= manifest.num_layers:
        raise Unfit(f"{name!r} is not there: the layers are 0 to {manifest.num_layers - 1}")
