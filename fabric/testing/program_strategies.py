"""Random programs for property tests: valid ones, and valid ones with something broken.

A valid program is grown node by node, with made-up numbers in place of the model's: a node joins it
if torch itself can carry it out in every step. What it shares with ``fabric.programs`` is the wire
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from fabric.messages import nodes as n
from fabric.messages.points import PointManifest, PointSpec
from fabric.messages.program import (
    Generate,
    LowRank,
    Normalized,
    Overlay,
    Program,
    ProgramRun,
    Rows,
    Scaled,
)
from fabric.testing.program_ops import DTYPES, Known, pure, reduced, sliced

Draw = Callable[[st.SearchStrategy[object]], object]
MAX_STEPS = 3


@dataclass(frozen=True, slots=True)
class Drawn:
    """A program with its constants."""

    program: Program
    constants: dict[str, Tensor]


@dataclass(slots=True)
class _Growing:
    """A run that grows: its nodes, and made-up values of each in each step (none: no value)."""

    manifest: PointManifest
    ids: tuple[int, ...]
    num_steps: int
    sel: n.Selector
    constants: dict[str, Tensor]
    nodes: list[n.Node] = field(default_factory=list)
    values: list[list[Known | None]] = field(default_factory=list)
    points: list[str | None] = field(default_factory=list)

    def positions(self, sel: n.Selector, step: int) -> list[int]:
        """Return what a selector takes in a step."""
        num = len(self.ids)
        here = list(range(num)) if step == 0 else [num + step - 1]
        if sel.phase != "all" and (sel.phase == "prefill") != (step == 0):
            return []
        if sel.pos == "last":
            return here[-1:]
        if isinstance(sel.pos, tuple):
            return [p % num if p < 0 else p for p in sel.pos if (p % num if p < 0 else p) in here]
        return here

    def at(self, spec: PointSpec, sel: n.Selector, step: int) -> Known | None:
        """Return made-up numbers in the shape of a selection."""
        rows = self.positions(sel, step)
        if not rows:
            return None
        keys = len(self.ids) + step
        shape = [len(rows) if s == "T" else keys if s == "S" else int(s) for s in spec.shape]
        if sel.heads is not None:
            shape[1] = len(sel.heads)
        if sel.dims is not None:
            shape[-1] = len(sel.dims)
        x = torch.rand(shape)
        return Known(x.to(DTYPES[spec.dtype]), tuple(rows))

    def add(self, node: n.Node, values: list[Known | None], point: str | None = None) -> int:
        """Append a node, and return its index."""
        self.nodes.append(node)
        self.values.append(values)
        self.points.append(point)
        return len(self.nodes) - 1

    def source(self, node: n.Node, x: Tensor) -> int:
        """Append a node with one value for all steps."""
        return self.add(node, [Known(x)] * self.num_steps)

    def compute(self, node: n.Node, refs: Sequence[int]) -> int | None:
        """Append a pure node, if torch can carry it out in every step; else ``None``."""
        made: list[Known | None] = []
        for step in range(self.num_steps):
            args = [self.values[ref][step] for ref in refs]
            known = [arg for arg in args if arg is not None]
            if len(known) < len(args):
                made.append(None)
                continue
            try:
                made.append(pure(node, known, len(self.nodes)))
            except (RuntimeError, IndexError, ValueError):
                return None
        if all(value is None for value in made):
            return None
        return self.add(node, made)

    def with_values(self, *dtypes: torch.dtype, axes: int = 0) -> list[int]:
        """Return the nodes whose values have one of the dtypes and so many axes."""
        return [
            index
            for index, steps in enumerate(self.values)
            if any(steps)
            and all(v is None or (v.x.dtype in dtypes and v.x.dim() >= axes) for v in steps)
        ]


_FLOATS = (torch.float32,)


@st.composite
def valid_programs(
    draw: st.DrawFn, manifest: PointManifest, *, gradients: bool = True, overlays: bool = True
) -> Drawn:
    """Draw a valid program of one or two runs, the second of which may take from the first."""
    constants: dict[str, Tensor] = {}
    first = _run(draw, manifest, "first", constants, [], gradients=gradients, overlays=overlays)
    runs = [first[0]]
    if draw(st.booleans()):
        second = _run(
            draw, manifest, "second", constants, first[1], gradients=gradients, overlays=overlays
        )
        runs.append(second[0])
    if draw(st.booleans()):
        runs.reverse()
    return Drawn(Program(runs=tuple(runs)), constants)


@st.composite
def broken_programs(draw: st.DrawFn, manifest: PointManifest) -> tuple[dict[str, object], Drawn]:
    """Draw a program as JSON in which a few fields are not what they were, and what it was."""
    drawn = draw(valid_programs(manifest))
    data = drawn.program.model_dump(mode="json")
    for _ in range(draw(st.integers(1, 3))):
        _break(draw, data)
    return data, drawn


def _run(
    draw: st.DrawFn,
    manifest: PointManifest,
    name: str,
    constants: dict[str, Tensor],
    saved: list[tuple[str, Tensor]],
    *,
    gradients: bool,
    overlays: bool,
) -> tuple[ProgramRun, list[tuple[str, Tensor]]]:
    # No other axis of a tiny model has so many: what fits in one step by chance may not in another.
    num = draw(st.sampled_from([1, 5, 7]))
    token = st.integers(0, manifest.vocabulary - 1)
    ids = tuple(draw(st.lists(token, min_size=num, max_size=num)))
    max_tokens = draw(st.integers(0, MAX_STEPS))
    growing = _Growing(
        manifest, ids, max(1, max_tokens), _selector(draw, len(ids), max(1, max_tokens)), constants
    )
    for save, x in saved:
        if draw(st.booleans()):
            growing.source(n.Saved(run="first", save=save), x)
    for point, spec in _some_points(draw, manifest, generates=max_tokens > 0):
        _visit(draw, growing, point, spec)
        for _ in range(draw(st.integers(0, 3))):
            _grow(draw, growing)
    if gradients and max_tokens == 0:
        _grow_gradient(draw, growing)
    saves = _save(draw, growing, name)
    over = _overlays(draw, manifest, constants) if overlays else ()
    run = ProgramRun(
        id=name,
        ids=ids,
        gen=Generate(max_tokens=max_tokens),
        nodes=tuple(growing.nodes),
        overlays=over,
    )
    return run, saves


def _selector(draw: st.DrawFn, num: int, num_steps: int) -> n.Selector:
    choices = [n.ALL, n.Selector(pos="last"), n.Selector(phase="prefill")]
    places = draw(st.lists(st.integers(-num, num - 1), min_size=1, max_size=3,
                           unique_by=lambda p: p % num))  # fmt: skip
    choices.append(n.Selector(pos=tuple(places)))
    if num_steps > 1:
        choices.append(n.Selector(phase="decode"))
    return draw(st.sampled_from(choices))


def _some_points(
    draw: st.DrawFn, manifest: PointManifest, *, generates: bool
) -> list[tuple[str, PointSpec]]:
    before = [spec for spec in manifest.points if not spec.layers]
    of_layers = [spec for spec in manifest.points if spec.layers]
    entry = manifest.points.index(of_layers[0])
    ordered = [(spec.pattern, spec) for spec in before[:entry]]
    for layer in range(manifest.num_layers):
        ordered += [(s.pattern.replace("{i}", str(layer)), s) for s in of_layers]
    ordered += [(spec.pattern, spec) for spec in before[entry:]]
    served = [
        (point, spec) for point, spec in ordered if spec.read and (generates or point != "sample")
    ]
    picked = draw(st.sets(st.integers(0, len(served) - 1), min_size=1, max_size=4))
    return [served[index] for index in sorted(picked)]


def _visit(draw: st.DrawFn, growing: _Growing, point: str, spec: PointSpec) -> None:
    sel = growing.sel if point != "sample" else n.ALL
    if point == "sample":
        values: list[Known | None] = [
            Known(torch.zeros(1, dtype=torch.int64), (len(growing.ids) + step - 1,))
            for step in range(growing.num_steps)
        ]
        growing.add(n.Read(at=point, sel=sel), values, point)
        return
    if len(spec.shape) == 3 and ".attn." in point and draw(st.booleans()):
        sel = sel.model_copy(update={"heads": (draw(st.integers(0, int(spec.shape[1]) - 1)),)})
    if isinstance(spec.shape[-1], int) and draw(st.integers(0, 3)) == 0:
        dims = draw(st.sets(st.integers(0, spec.shape[-1] - 1), min_size=1, max_size=3))
        sel = sel.model_copy(update={"dims": tuple(sorted(dims))})
    values = [growing.at(spec, sel, step) for step in range(growing.num_steps)]
    growing.add(n.Read(at=point, sel=sel), values, point)
    if spec.write and draw(st.booleans()):
        _change(draw, growing, point, sel, values)


def _change(
    draw: st.DrawFn,
    growing: _Growing,
    point: str,
    sel: n.Selector,
    h: list[Known | None],
) -> None:
    fitting = [
        index
        for index in growing.with_values(*_FLOATS)
        if all(here is None or _fits(growing.values[index][step], here.x) for step, here in
               enumerate(h))
    ]  # fmt: skip
    alpha = draw(st.sampled_from([1.0, 0.5, -2.0]))
    gate = next((i for i, node in enumerate(growing.nodes) if isinstance(node, n.Gate)
                 and all(here is None or _gates(growing.values[i][step], here)
                         for step, here in enumerate(h))), None)  # fmt: skip
    node: n.Node = n.Write(at=point, sel=sel, mode="scale", alpha=alpha, gate=gate)
    if fitting:
        x = draw(st.sampled_from(fitting))
        last = [v.x.shape[-1:] for v in growing.values[x] if v is not None]
        whole = all(here is None or here.x.shape[-1:] == size
                    for here, size in zip(h, last * len(h), strict=False))  # fmt: skip
        kinds = ["set", "add", "match", "preserve"] + (["project", "clamp"] if whole else [])
        match draw(st.sampled_from(kinds)):
            case "project":
                node = n.Project(at=point, sel=sel, v=x, c=alpha, gate=gate)
            case "clamp":
                node = n.Clamp(at=point, sel=sel, v=x, lo=-1.0, hi=alpha + 3.0, gate=gate)
            case "set":
                node = n.Write(at=point, sel=sel, x=x, alpha=alpha, gate=gate)
            case "add":
                node = n.Write(at=point, sel=sel, x=x, mode="add", alpha=alpha, gate=gate)
            case norm:
                node = n.Write(
                    at=point, sel=sel, x=x, mode="add", alpha=alpha, norm=norm, gate=gate
                )
    growing.add(node, [None] * growing.num_steps, point)


def _fits(x: Known | None, h: Tensor) -> bool:
    if x is None or x.x.dim() > h.dim():
        return False
    return all(a in (1, b) for a, b in zip(x.x.shape[::-1], h.shape[::-1], strict=False))


def _gates(gate: Known | None, h: Known) -> bool:
    return gate is not None and gate.x.shape[0] in (1, h.x.shape[0])


def _grow(draw: st.DrawFn, growing: _Growing) -> None:
    """Add a node over what is there, or a source, if the first that is drawn is possible."""
    floats = growing.with_values(*_FLOATS)
    kind = draw(
        st.sampled_from(["source", "unary", "binary", "reduce", "shape", "product", "model"])
    )
    if kind == "source" or not floats:
        _grow_source(draw, growing)
        return
    x = draw(st.sampled_from(floats))
    rank = next(v.x.dim() for v in growing.values[x] if v is not None)
    axis = draw(st.integers(-rank, rank - 1)) if rank else 0
    y = draw(st.sampled_from(floats))
    choices: list[n.Node]
    match kind:
        case "unary":
            choices = [
                n.Unary(op="relu", x=x), n.Unary(op="jumprelu", x=x, threshold=0.5),
                n.Unary(op="gelu", x=x), n.Unary(op="tanh", x=x), n.Unary(op="abs", x=x),
                n.Cast(x=x, dtype="bfloat16"), n.Noise(like=x, seed=3, sigma=0.5),
                n.Binary(op="mul", x=x, k=0.25), n.Binary(op="gt", x=x, k=0.5),
            ]  # fmt: skip
            growing.compute(draw(st.sampled_from(choices)), [x])
        case "binary":
            op = draw(st.sampled_from(["add", "sub", "mul", "maximum", "lt"]))
            growing.compute(n.Binary(op=op, x=x, y=y), [x, y])
        case "reduce" if rank:
            op = draw(st.sampled_from(["sum", "mean", "max", "norm", "var", "argmax", "logsumexp"]))
            keep = draw(st.booleans())
            growing.compute(n.Reduce(op=op, x=x, axes=(axis,), keepdim=keep), [x])
            growing.compute(n.Softmax(op="softmax", x=x, axis=axis), [x])
            if rank == 1:
                growing.compute(n.Gate(x=x, threshold=0.5), [x])
        case "shape" if rank:
            choices = [
                n.Slice(x=x, index=(None,) * (axis % rank) + ((0, 1),)),
                n.Slice(x=x, index=(None,) * (axis % rank) + (-1,)),
                n.Gather(x=x, axis=axis, indices=(0, -1)),
                n.TopK(x=x, k=1, part=draw(st.sampled_from(["values", "indices"]))),
                n.Reshape(op="permute", x=x, shape=tuple(range(rank))[::-1]),
                n.Concat(op="stack", args=(x, x), axis=axis),
                n.Concat(op="concat", args=(x, x), axis=axis),
                n.Reshape(op="reshape", x=x, shape=(-1,)),
            ]  # fmt: skip
            node = draw(st.sampled_from(choices))
            growing.compute(node, [x, x] if isinstance(node, n.Concat) else [x])
        case "product" if rank:
            if {x, y} <= set(growing.with_values(*_FLOATS, axes=2)):
                growing.compute(n.Matmul(x=x, y=y), [x, y])
            growing.compute(n.Cosine(x=x, y=x, axis=axis), [x, x])
            if rank == 2:
                growing.compute(n.Einsum(args=(x, x), equation="ab,ab->a"), [x, x])
                growing.compute(n.Linear(x=x, weight=x), [x, x])
        case "model":
            _grow_by_model(growing, x)


def _grow_source(draw: st.DrawFn, growing: _Growing) -> None:
    manifest = growing.manifest
    hidden, name = manifest.hidden, f"c{len(growing.constants)}"
    shape = draw(st.sampled_from([(hidden,), (1,), (), (hidden, 3), (2, hidden)]))
    weight = draw(st.sampled_from(sorted(manifest.weights)))
    match draw(st.integers(0, 3)):
        case 0:
            growing.constants[name] = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(
                shape
            )
            growing.source(n.Const(name=name), growing.constants[name])
        case 1:
            growing.source(n.Zeros(shape=shape, fill=0.5), torch.full(shape, 0.5))
        case 2:
            growing.source(
                n.TokenRows(op="model.unembed_rows", ids=(0, manifest.vocabulary - 1)),
                torch.zeros(2, hidden),
            )
        case _:
            index = ((0, 2),)
            x = sliced(torch.zeros(manifest.weights[weight]), index)
            growing.source(n.WeightRead(name=weight, index=index), x)


def _grow_by_model(growing: _Growing, x: int) -> None:
    hidden = growing.manifest.hidden
    if all(v is None or v.x.shape[-1:] == (hidden,) for v in growing.values[x]):
        normed = growing.add(n.Norm(x=x), growing.values[x])
        logits = [
            None if v is None else Known(
                v.x.new_zeros(*v.x.shape[:-1], growing.manifest.vocabulary),
                v.at if v.x.dim() > 1 else None,
            )
            for v in growing.values[x]
        ]  # fmt: skip
        growing.add(n.Unembed(x=normed), logits)


def _grow_gradient(draw: st.DrawFn, growing: _Growing) -> None:
    reads = [i for i, node in enumerate(growing.nodes)
             if isinstance(node, n.Read) and i in growing.with_values(*_FLOATS)]  # fmt: skip
    if not reads or not draw(st.booleans()):
        return
    x = draw(st.sampled_from(reads))
    wrt = draw(st.sampled_from([i for i in reads if i <= x]))
    total = growing.compute(n.Reduce(op="sum", x=x), [x])
    assert total is not None
    read = growing.nodes[wrt]
    assert isinstance(read, n.Read)
    growing.add(n.Grad(scalar=total, wrt=read.at, sel=read.sel), growing.values[wrt])


def _save(draw: st.DrawFn, growing: _Growing, name: str) -> list[tuple[str, Tensor]]:
    """Save what can be saved; return what a later run may take, with its shape."""
    kept = []
    for index in range(len(growing.nodes)):
        steps = [v for v in growing.values[index] if v is not None]
        static = len({id(v) for v in steps}) == 1
        tails = {v.x.shape[1:] if v.at is not None else v.x.shape for v in steps}
        if not steps or (len(tails) > 1 and not static) or not draw(st.booleans()):
            continue
        reduce = None
        if steps[0].x.dim() and steps[0].x.dtype in _FLOATS and draw(st.integers(0, 3)) == 0:
            reduce = draw(st.sampled_from(["mean", "sum", "max", "last", "norm"]))
        save = n.Save(name=f"n{index}", x=index, reduce=reduce)
        growing.nodes.append(save)
        if len(steps) == 1 and name == "first":
            x = steps[0].x if reduce is None else reduced(reduce, steps[0].x)
            kept.append((save.name, x))
    return kept


def _overlays(
    draw: st.DrawFn, manifest: PointManifest, constants: dict[str, Tensor]
) -> tuple[Overlay, ...]:
    if draw(st.integers(0, 3)):
        return ()
    matrices = [name for name, shape in manifest.weights.items() if len(shape) == 2]
    weight = draw(st.sampled_from(sorted(matrices)))
    rows, columns = manifest.weights[weight]
    if manifest.family == "gpt2" and ".c_" in weight:
        rows, columns = columns, rows
    u, v, row = (f"{name}{len(constants)}" for name in ("u", "v", "row"))
    constants[u], constants[v] = torch.ones(rows, 2) * 0.01, torch.ones(columns, 2)
    constants[row] = torch.zeros(1, columns)
    overlays: list[Overlay] = [
        LowRank(weight=weight, u=u, v=v),
        Scaled(weight=weight, k=0.5),
        Rows(weight=weight, index=(rows - 1,), x=row),
        Normalized(weight=weight),
    ]
    return (draw(st.sampled_from(overlays)),)


_JUNK = st.one_of(
    st.integers(-4, 40),
    st.sampled_from([10**30, -1.5, float("inf"), "", "x", None, True]),
    st.lists(st.integers(-3, 70), max_size=4),
)
_STRINGS = {
    "at": ["layers.9.out", "layers.0.out", "layers.0.attn.nothing", "logits", "sample", "embed.out",
           "layers.1.attn.pattern", "layers.1.mlp.act", "layers.1.moe.router", "layers.0.mid"],
    "run": ["first", "second", "third"],
    "save": ["n0", "n1", "n2"],
    "name": ["n0", "c0", "c1", "lm_head.weight"],
    "phase": ["prefill", "decode", "all"],
    "pos": ["last", "all"],
    "mode": ["set", "add", "scale"],
    "norm": ["none", "match", "preserve"],
    "dtype": ["float32", "bfloat16", "int64", "bool"],
    "reduce": ["mean", "sum", "max", "last", "norm"],
    "site": ["final.norm", "layers.1.mlp.norm", "layers.7.mlp.norm", "layers.1.norm"],
    "equation": ["ab,ab->a", "ab,cb->ac", "ab,ab->ba", "aa,ab->b", "ab->a", "ab,ab->c"],
    "op": ["sum", "mean", "argmax", "max", "add", "lt", "div", "concat", "stack", "reshape",
           "permute", "softmax", "relu", "log"],
    "id": ["first", "second"],
}  # fmt: skip
_STRINGS["wrt"] = _STRINGS["at"]


def _break(draw: st.DrawFn, data: dict[str, object]) -> None:
    """Replace one leaf of the runs, or exchange or drop an entry of a list."""
    at: object = data["runs"]
    key: object = None
    while True:
        if isinstance(at, dict):
            key = draw(st.sampled_from(sorted(at)))
        elif isinstance(at, list):
            key = draw(st.integers(0, len(at) - 1))
            if len(at) > 1 and draw(st.integers(0, 9)) == 0:
                other = draw(st.integers(0, len(at) - 1))
                at[key], at[other] = at[other], at[key]
                return
        inner = at[key]  # type: ignore[index]
        if not isinstance(inner, dict | list) or not inner:
            at[key] = _broken_leaf(draw, key, inner)  # type: ignore[index]
            return
        at = inner


def _broken_leaf(draw: st.DrawFn, key: object, leaf: object) -> object:
    if draw(st.integers(0, 9)) == 0:
        return draw(_JUNK)
    if isinstance(leaf, str) or key in ("reduce", "dtype"):
        return draw(st.sampled_from(_STRINGS.get(str(key), [str(leaf), "other"])))
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int):
        return draw(st.sampled_from([leaf + 1, leaf - 1, 0, 1, -1, leaf + 64, 2**31 - 1]))
    if isinstance(leaf, float):
        return draw(st.sampled_from([-leaf, 1e30, float("nan")]))
    return draw(st.sampled_from([0, 1, [0], [0, 1], [[0, 1]], []]))
