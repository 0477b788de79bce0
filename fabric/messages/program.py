"""Intervention programs: what a user may read and write inside a forward pass, as data.

A program is a set of runs over one model version. A run is a prompt, how it goes on, and a list of
nodes; a node refers only to nodes before it. Nothing in it is code.

**Steps.** A run's tokens have positions, the prompt's from 0 on. Step 0 runs the prompt (however
the engine divides it), step *s* the *s*-th generated token. A node that touches the model acts in
the steps and at the positions that its selector names; its value holds those positions, in order,
as its first axis. A node over others' values is evaluated in each step in which one of them was,
with the newest value of the rest; a source has one value for all steps. What a save was given is
concatenated over steps along the first axis if that axis is the positions' and stacked if not.

**Order.** Within a step the nodes that touch the model are written in the order in which the model
comes by their points.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from fabric.messages.nodes import MAX_NODES, Name, Node, Scalar, WeightName
from fabric.messages.wire import Wire

MAX_RUNS = 1024
MAX_CONSTS_BYTES = 64 * 2**20
MAX_INLINE_BYTES = 4 * 2**20
"""Of constants in a request, and of one run's saves in its answer; larger ones go by handle."""
MAX_RESULT_BYTES = 2**30
MAX_GENERATED = 4096


class LowRank(Wire):
    """W + alpha · U Vᵀ, U [out, r] and V [in, r] constants: y += alpha (x V) Uᵀ."""

    kind: Literal["lowrank"] = "lowrank"
    weight: WeightName
    u: Name
    v: Name
    alpha: Scalar = 1.0


class Scaled(Wire):
    """k W."""

    kind: Literal["scale"] = "scale"
    weight: WeightName
    k: Scalar


class Rows(Wire):
    """W with these rows replaced by a constant [n, in]."""

    kind: Literal["rows"] = "rows"
    weight: WeightName
    index: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1)
    x: Name


class Normalized(Wire):
    """W with every row (``axis`` 1) or column (0) scaled to length 1."""

    kind: Literal["normalize"] = "normalize"
    weight: WeightName
    axis: Literal[0, 1] = 1


Overlay = Annotated[LowRank | Scaled | Rows | Normalized, Field(discriminator="kind")]
"""A change of a weight for one run alone."""


class StartAt(Wire):
    """Enter the stack before a layer with given hidden states, [positions, hidden].

    ``x`` is a constant, or ``run/save`` of another run.
    """

    layer: int = Field(ge=0, lt=4096)
    x: Name


class Generate(Wire):
    """How a run goes on after its prompt: greedy at temperature 0, or sampled with the seed."""

    max_tokens: int = Field(default=0, ge=0, le=MAX_GENERATED)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    ignore_eos: bool = True


class ProgramRun(Wire):
    """One pass over one prompt: ``text`` or token ``ids``.

    ``stop_at`` ends the forward pass before that layer; nothing is generated then.
    """

    id: Name
    text: str | None = None
    ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = None
    gen: Generate = Generate()
    nodes: tuple[Node, ...] = Field(default=(), max_length=MAX_NODES)
    overlays: tuple[Overlay, ...] = Field(default=(), max_length=256)
    start_at: StartAt | None = None
    stop_at: int | None = Field(default=None, ge=0, lt=4096)

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        if (self.text is None) == (not self.ids):
            raise ValueError(f"run {self.id!r} takes either a text or token ids")
        return self


class Constants(Wire):
    """The program's tensors, as one safetensors file: inline in base64, or stored before.

    Both must have this size in bytes and this SHA-256; they are checked before anything is read.
    """

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: int = Field(ge=8, le=MAX_CONSTS_BYTES)
    data: str | None = Field(default=None, repr=False)
    handle: dict[str, object] | None = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if (self.data is None) == (self.handle is None):
            raise ValueError("constants are either inline (data) or stored (handle)")
        return self


class ProgramLimits(Wire):
    """What the user allows it to take; the tier's own caps hold too."""

    result_bytes: int = Field(default=64 * 2**20, ge=0, le=MAX_RESULT_BYTES)
    device_s: float = Field(default=60.0, gt=0.0, le=3600.0)


class Program(Wire):
    """A whole program. Its model and revision are the request's."""

    v: Literal[1] = 1
    runs: tuple[ProgramRun, ...] = Field(min_length=1, max_length=MAX_RUNS)
    consts: Constants | None = None
    limits: ProgramLimits = ProgramLimits()

    @property
    def num_nodes(self) -> int:
        """Nodes of all runs."""
        return sum(len(run.nodes) for run in self.runs)
