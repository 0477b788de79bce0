"""The nodes of an intervention program: what reads, writes, computes and saves.

A node refers only to nodes before it, by index. How they are evaluated stands in
``fabric.messages.program``. Nothing in them is code.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from fabric.messages.wire import Wire

MAX_NODES = 4096
MAX_AXES = 8

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.\[\],/ -]{0,127}$")]
"""Of a run, a save or a constant."""

Point = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.]{0,95}$")]
"""A place in the forward pass in canonical form: ``layers.5.attn.out``; see ``fabric points``."""

WeightName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,160}$")]
"""A parameter, by its name in the model's own files: ``model.layers.5.mlp.down_proj.weight``."""

Ref = Annotated[int, Field(ge=0, lt=MAX_NODES)]
"""A node before this one, by its index."""

Axis = Annotated[int, Field(ge=-MAX_AXES, lt=MAX_AXES)]
Index = Annotated[int, Field(ge=-(2**31), lt=2**31)]
DType = Literal["float32", "bfloat16", "float16", "int64", "bool"]
Scalar = Annotated[float, Field(ge=-1e30, le=1e30)]


class Span(Wire):
    """The tokens of the prompt that cover a text, at its first (or ``occurrence``-th) place."""

    span: str = Field(min_length=1, max_length=4096)
    occurrence: int = Field(default=0, ge=0, lt=4096)


class Selector(Wire):
    """Which part of a point is meant.

    ``pos`` are the run's own token positions; negative ones count back from the prompt's end.
    ``steps`` is a half-open range, ``None`` all of the ``phase``. ``heads`` is for points that have
    heads, ``dims`` for the last axis.
    """

    phase: Literal["prefill", "decode", "all"] = "all"
    steps: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    pos: Literal["all", "last"] | tuple[Index, ...] | Span = "all"
    heads: tuple[Annotated[int, Field(ge=0, lt=4096)], ...] | None = None
    dims: tuple[Annotated[int, Field(ge=0, lt=2**20)], ...] | None = None


ALL = Selector()


class Read(Wire):
    """The value at a point, after this run's earlier writes there."""

    op: Literal["read"] = "read"
    at: Point
    sel: Selector = ALL


class _Change(Wire):
    """What changes a point: this run's tokens only. ``gate`` multiplies its strength."""

    at: Point
    sel: Selector = ALL
    gate: Ref | None = None


class Write(_Change):
    """``set``: (1 - am)h + am·x; ``add``: h + am·x; ``scale``: h(1 + gm(alpha - 1)), without x.

    g is the gate, or 1, and a is g times ``alpha``. ``norm`` is for ``add``: with ``match`` x is
    first given the norm of h, with ``preserve`` the sum is rescaled to it. ``mask`` is m, which
    broadcasts to h.
    """

    op: Literal["write"] = "write"
    x: Ref | None = None
    mode: Literal["set", "add", "scale"] = "set"
    alpha: Scalar = 1.0
    norm: Literal["none", "match", "preserve"] = "none"
    mask: Ref | None = None

    @model_validator(mode="after")
    def _has_what_its_mode_needs(self) -> Self:
        if (self.mode == "scale") != (self.x is None):
            raise ValueError("a write takes x in the modes 'set' and 'add', and none in 'scale'")
        if self.norm != "none" and self.mode != "add":
            raise ValueError(f"norm {self.norm!r} is for the mode 'add'")
        return self


class Project(_Change):
    """h + (c - 1)(h·v̂)v̂: ``c`` 0 removes the direction, 2 doubles it."""

    op: Literal["project"] = "project"
    v: Ref
    c: Scalar = 0.0


class Clamp(_Change):
    """h + s(clip(h·v̂, lo, hi) - h·v̂)v̂."""

    op: Literal["clamp"] = "clamp"
    v: Ref
    lo: Scalar
    hi: Scalar
    s: Scalar = 1.0


class Skip(Wire):
    """Let a module's output be x instead of what it computes: ``layers.5``, ``layers.5.mlp``."""

    op: Literal["skip"] = "skip"
    module: Point
    x: Ref
    sel: Selector = ALL


class Gate(Wire):
    """1 where x compares so with the threshold, else 0, per token; x has one number a token.

    ``latch``: once 1, it stays 1 for the later tokens of the run.
    """

    op: Literal["gate"] = "gate"
    x: Ref
    cmp: Literal["gt", "ge", "lt", "le"] = "gt"
    threshold: Scalar
    latch: bool = False


class Const(Wire):
    """A tensor of the program's constants."""

    op: Literal["const"] = "const"
    name: Name


class Zeros(Wire):
    """Zeros (or ``fill``) of this shape."""

    op: Literal["zeros"] = "zeros"
    shape: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(max_length=MAX_AXES)
    fill: Scalar = 0.0


class Noise(Wire):
    """Normal noise in the shape of another value; a function of (seed, node, position) alone."""

    op: Literal["noise"] = "noise"
    like: Ref
    seed: int = Field(ge=0, lt=2**63)
    sigma: float = Field(ge=0.0, le=1e6)


class Saved(Wire):
    """What another run saved; ``positions`` takes these of its first axis. Runs form a DAG.

    ``mean`` averages over the first axis (what *mean ablation* writes).
    """

    op: Literal["saved"] = "saved"
    run: Name
    save: Name
    positions: tuple[Index, ...] | None = None
    mean: bool = False


class Artifact(Wire):
    """A tensor of a stored result: its handle, run and save."""

    op: Literal["artifact"] = "artifact"
    id: Annotated[str, StringConstraints(pattern=r"^art_[0-9a-f]{32}$")]
    run: Name
    save: Name


class Unary(Wire):
    """One value, element by element; ``jumprelu`` keeps x where it is over ``threshold``."""

    op: Literal[
        "relu", "jumprelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh",
        "exp", "log", "abs", "neg", "sqrt", "rsqrt",
    ]  # fmt: skip
    x: Ref
    threshold: Scalar = 0.0


class Binary(Wire):
    """Two values that broadcast; a number stands for ``y`` where there is none."""

    op: Literal["add", "sub", "mul", "div", "maximum", "minimum", "gt", "ge", "lt", "le", "eq"]
    x: Ref
    y: Ref | None = None
    k: Scalar | None = None

    @model_validator(mode="after")
    def _has_one_other(self) -> Self:
        if (self.y is None) == (self.k is None):
            raise ValueError(f"{self.op} takes either y or the number k")
        return self


class Matmul(Wire):
    """x @ y over the last two axes."""

    op: Literal["matmul"] = "matmul"
    x: Ref
    y: Ref


class Linear(Wire):
    """x @ weightᵀ + bias."""

    op: Literal["linear"] = "linear"
    x: Ref
    weight: Ref
    bias: Ref | None = None


class Einsum(Wire):
    """A sum of products: single letters, an explicit output, at most four operands."""

    op: Literal["einsum"] = "einsum"
    args: tuple[Ref, ...] = Field(min_length=1, max_length=4)
    equation: Annotated[
        str, StringConstraints(pattern=r"^[a-z]{0,8}(,[a-z]{0,8}){0,3}->[a-z]{0,8}$")
    ]


class Reduce(Wire):
    """Over ``axes`` (none: all): ``norm`` is Euclidean, ``argmax`` takes one axis, ``var`` is the
    population's."""

    op: Literal["sum", "mean", "max", "min", "var", "norm", "argmax", "logsumexp"]
    x: Ref
    axes: tuple[Axis, ...] = ()
    keepdim: bool = False


class Cosine(Wire):
    """The cosine between x and y along an axis."""

    op: Literal["cosine"] = "cosine"
    x: Ref
    y: Ref
    axis: Axis = -1


class Softmax(Wire):
    """Along an axis, in float32."""

    op: Literal["softmax", "log_softmax"]
    x: Ref
    axis: Axis = -1


class TopK(Wire):
    """The ``k`` largest along the last axis: their ``part``, values or indices."""

    op: Literal["topk"] = "topk"
    x: Ref
    k: int = Field(ge=1, le=1024)
    part: Literal["values", "indices"] = "values"


class Where(Wire):
    """x where the condition is not 0, else y."""

    op: Literal["where"] = "where"
    cond: Ref
    x: Ref
    y: Ref


class Slice(Wire):
    """x[index]: an integer drops its axis, a pair is a half-open range, null takes all."""

    op: Literal["slice"] = "slice"
    x: Ref
    index: tuple[Index | tuple[Index | None, Index | None] | None, ...] = Field(max_length=MAX_AXES)


class Gather(Wire):
    """Entries of x along an axis by their indices: a list here, or another value.

    One of one axis takes that axis's place; one with as many axes as x picks along it.
    """

    op: Literal["gather"] = "gather"
    x: Ref
    axis: Axis = 0
    indices: tuple[Index, ...] | None = None
    by: Ref | None = None

    @model_validator(mode="after")
    def _has_one_index(self) -> Self:
        if (self.indices is None) == (self.by is None):
            raise ValueError("gather takes either indices or by")
        return self


class Concat(Wire):
    """Values one after the other along an axis; ``stack`` makes that axis."""

    op: Literal["concat", "stack"]
    args: tuple[Ref, ...] = Field(min_length=1, max_length=MAX_NODES)
    axis: Axis = 0


class Reshape(Wire):
    """The same numbers in another shape (one -1 allowed), or with axes exchanged."""

    op: Literal["reshape", "permute"]
    x: Ref
    shape: tuple[Annotated[int, Field(ge=-1, lt=2**31)], ...] = Field(max_length=MAX_AXES)


class Cast(Wire):
    """x in another dtype."""

    op: Literal["cast"] = "cast"
    x: Ref
    dtype: DType


class Norm(Wire):
    """The model's own norm at a point (``final.norm``, ``layers.3.attn.norm``) of any hidden x."""

    op: Literal["model.norm"] = "model.norm"
    x: Ref
    site: Point = "final.norm"


class Unembed(Wire):
    """Logits over the vocabulary of hidden states that are normed already."""

    op: Literal["model.unembed"] = "model.unembed"
    x: Ref


class TokenRows(Wire):
    """Rows of the embedding (what these tokens enter as) or of the unembedding, [n, hidden]."""

    op: Literal["model.embed", "model.unembed_rows"]
    ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1, max_length=65_536)


class Module(Wire):
    """What one module of the model makes of x: a layer (``layers.5``), or one matmul by name.

    A layer is given its positions from 0 on and no past.
    """

    op: Literal["model.module"] = "model.module"
    module: WeightName
    x: Ref


class WeightRead(Wire):
    """A parameter as this run has it, its overlays applied: a slice, or its statistics.

    ``stats`` are [mean, standard deviation, least, largest, Euclidean norm].
    """

    op: Literal["weight.read"] = "weight.read"
    name: WeightName
    index: tuple[Index | tuple[Index | None, Index | None] | None, ...] = Field(
        default=(), max_length=MAX_AXES
    )
    stats: bool = False


class Grad(Wire):
    """The gradient of a scalar with respect to the value at a point, in its shape."""

    op: Literal["grad"] = "grad"
    scalar: Ref
    wrt: Point
    sel: Selector = ALL


class Save(Wire):
    """Return a value under a name. ``reduce`` shrinks it first; ``stream`` sends each step's."""

    op: Literal["save"] = "save"
    name: Name
    x: Ref
    dtype: DType | None = None
    reduce: Literal["mean", "sum", "max", "last", "norm"] | None = None
    stream: bool = False


Node = Annotated[
    Read | Write | Project | Clamp | Skip | Gate
    | Const | Zeros | Noise | Saved | Artifact
    | Unary | Binary | Matmul | Linear | Einsum | Reduce | Cosine | Softmax | TopK | Where
    | Slice | Gather | Concat | Reshape | Cast
    | Norm | Unembed | TokenRows | Module | WeightRead | Grad | Save,
    Field(discriminator="op"),
]  # fmt: skip
