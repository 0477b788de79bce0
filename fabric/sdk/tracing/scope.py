"""What a run computes with: arrays, noise, the model's own parts, values of other runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fabric.messages import nodes as wire
from fabric.sdk.tracing.lines import refuse
from fabric.sdk.tracing.operand import Operand
from fabric.sdk.tracing.record import Recorder
from fabric.sdk.tracing.values import Saved, Value

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array
    from fabric.sdk.programs import RunResult
    from fabric.sdk.tracing.session import Session


class Scope:
    """What the values of one run belong to, and how they are made.

    Args:
        session: What the run belongs to.
        id: The run's name in the program.
    """

    def __init__(self, session: Session, id: str) -> None:
        self.id = id
        self.record = Recorder()
        self.model = ModelParts(self)
        self._session = session
        self._saves: dict[str, Saved] = {}

    def const(self, array: object) -> Value:
        """Return an array of this program as a value."""
        made = as_constant(array)
        name = self._session.add_constant(made)
        return Value(self, self.record.add(wire.Const, name=name), made.ndim)

    def zeros(self, *shape: int, fill: float = 0.0) -> Value:
        """Return zeros, or ``fill``, of a shape."""
        return Value(self, self.record.add(wire.Zeros, shape=shape, fill=fill), len(shape))

    def noise(self, like: object, *, sigma: float, seed: int = 0) -> Value:
        """Return normal noise in the shape of a value: the same for the same seed."""
        value = self.value(like)
        at = self.record.add(wire.Noise, like=value.node, seed=seed, sigma=sigma)
        return Value(self, at, value.ndim)

    def concat(self, values: Sequence[object], axis: int = 0) -> Value:
        """Return values one after the other along an axis."""
        args = [self.value(value) for value in values]
        refs = tuple(arg.node for arg in args)
        at = self.record.add(wire.Concat, op="concat", args=refs, axis=axis)
        return Value(self, at, args[0].ndim if args else None)

    def stack(self, values: Sequence[object], axis: int = 0) -> Value:
        """Return values side by side along a new axis."""
        args = [self.value(value) for value in values]
        refs = tuple(arg.node for arg in args)
        at = self.record.add(wire.Concat, op="stack", args=refs, axis=axis)
        return Value(self, at, None if not args or args[0].ndim is None else args[0].ndim + 1)

    def einsum(self, equation: str, *values: object) -> Value:
        """Return a sum of products over single letters, with an explicit output."""
        refs = tuple(self.ref(value) for value in values)
        at = self.record.add(wire.Einsum, args=refs, equation=equation.replace(" ", ""))
        return Value(self, at, len(equation.partition("->")[2].strip()))

    def artifact(self, id: str, run: str, save: str) -> Value:
        """Return what an earlier program saved and the hub keeps."""
        return Value(self, self.record.add(wire.Artifact, id=id, run=run, save=save), None)

    def lens(self, hidden: object) -> Value:
        """Return the logits that hidden states stand for: the final norm, then the unembedding."""
        return self.model.unembed(self.model.norm(hidden))

    def weight(self, name: str, *, stats: bool = False) -> Value:
        """Return a parameter as this run has it; with ``stats`` its mean, deviation, least,
        largest and length."""
        shape = self._session.manifest.weights.get(name)
        at = self.record.add(wire.WeightRead, name=name, stats=stats)
        return Value(self, at, 1 if stats else None if shape is None else len(shape))

    def value(self, x: object) -> Value:
        """Return anything that can be computed with as a value of this run.

        What belongs to another run is saved there and referred to.
        """
        if isinstance(x, Operand):
            value = x._value()
            if value.run is self:
                return value
            if value.run._session is self._session:
                saved = value.run.keep(value)
                at = self.record.add(wire.Saved, run=value.run.id, save=saved.name)
                return Value(self, at, value.run.joined_ndim(value))
            if isinstance(x, Saved) and x.run.is_done:
                return self.const(x.value)
            raise refuse(
                "This value belongs to a trace that is not over. Runs that read each other belong"
                " in one `with fabric.session(model)`."
            )
        if isinstance(x, int | float):
            return self.zeros(fill=float(x))
        return self.const(x)

    def ref(self, x: object) -> int:
        """Return the node of anything that can be computed with."""
        return self.value(x).node

    def keep(self, value: Value, name: str | None = None, **how: Any) -> Saved:
        """Save a value; one that was saved as a whole already is not saved again."""
        if name is None and not any(how.values()):
            for saved in self._saves.values():
                if saved.node == value.node and saved.is_whole:
                    return saved
        name = name or self.new_name()
        if name in self._saves:
            raise refuse(f"The name {name!r} is taken in this run; each save has its own.")
        self.record.add(wire.Save, name=name, x=value.node, **how)
        self._saves[name] = Saved(value, name, is_whole=not any(how.values()))
        return self._saves[name]

    def joined_ndim(self, value: Value) -> int | None:
        """Return the axes of a save of a value, which several steps may have one more of."""
        return value.ndim

    def new_name(self) -> str:
        """Return a name that no save has."""
        number = len(self._saves)
        while (name := f"_{number}") in self._saves:
            number += 1
        return name

    @property
    def is_done(self) -> bool:
        """Whether the results are there."""
        return self._session.result is not None

    @property
    def result(self) -> RunResult:
        """What this run gave.

        Raises:
            TraceError: The trace is not over, or has failed.
        """
        if self._session.result is None:
            raise refuse("There is no value yet: it comes when the outermost `with` block is over.")
        return self._session.result[self.id]


class ModelParts:
    """Parts of the model as functions of any hidden states."""

    def __init__(self, run: Scope) -> None:
        self._run = run

    def norm(self, hidden: object, site: str = "final.norm") -> Value:
        """The norm at a site: ``final.norm``, ``layers.3.attn.norm``, …"""
        return self._make(wire.Norm, hidden, site=site)

    def unembed(self, hidden: object) -> Value:
        """Logits over the vocabulary of hidden states that are normed already."""
        return self._make(wire.Unembed, hidden)

    def module(self, name: str, hidden: object) -> Value:
        """What one layer or one matmul makes of hidden states."""
        return self._make(wire.Module, hidden, module=name)

    def embed(self, ids: Sequence[int]) -> Value:
        """What tokens enter as, [n, hidden]."""
        at = self._run.record.add(wire.TokenRows, op="model.embed", ids=tuple(ids))
        return Value(self._run, at, 2)

    def unembed_rows(self, ids: Sequence[int]) -> Value:
        """The directions whose products with hidden states are tokens' logits, [n, hidden]."""
        at = self._run.record.add(wire.TokenRows, op="model.unembed_rows", ids=tuple(ids))
        return Value(self._run, at, 2)

    def _make(self, kind: type[Any], hidden: object, **fields: object) -> Value:
        value = self._run.value(hidden)
        return value._make(kind, value.ndim, **fields)


def as_constant(x: object) -> Array:
    """Return an array that a program can hold.

    Raises:
        TraceError: It is made of something else than real numbers.
    """
    from fabric.sdk.arrays import as_array

    try:
        return as_array(x)
    except (TypeError, ValueError) as error:
        raise refuse(f"{error}; a program holds arrays of real numbers.") from None
