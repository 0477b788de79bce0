"""Values of a trace: what will be computed where the model is, and what comes back of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fabric.messages import nodes as wire
from fabric.sdk.tracing.index import slices
from fabric.sdk.tracing.lines import refuse
from fabric.sdk.tracing.operand import Compare, Operand, fewer

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array
    from fabric.sdk.tracing.scope import Scope


class Value(Operand):
    """The result of a node of a run.

    Args:
        run: The run it belongs to.
        node: Its node, by index.
        ndim: How many axes it has, where that is known.
    """

    __slots__ = ("ndim", "node", "run")

    def __init__(self, run: Scope, node: int, ndim: int | None) -> None:
        self.run = run
        self.node = node
        self.ndim = ndim

    def __repr__(self) -> str:
        node = self.run.record.nodes[self.node]
        return f"<{type(self).__name__} {node.op} of run {self.run.id!r}>"

    def _value(self) -> Value:
        return self

    def compared(self, op: Compare, other: object) -> Compared:
        """Return a comparison with a number or with another value."""
        add = self.run.record.add
        if isinstance(other, int | float):
            at = add(wire.Binary, op=op, x=self.node, k=float(other))
            return Compared(self.run, at, self.ndim, op, self, float(other))
        right = self.run.value(other)
        at = add(wire.Binary, op=op, x=self.node, y=right.node)
        difference = self - right
        return Compared(self.run, at, difference.ndim, op, difference, 0.0)

    def top(self, k: int) -> TopK:
        """Return the ``k`` largest along the last axis, and where they are."""
        return TopK(
            self._make(wire.TopK, self.ndim, k=k, part="values"),
            self._make(wire.TopK, self.ndim, k=k, part="indices"),
        )

    def _make(self, kind: type[Any], ndim: int | None, **fields: object) -> Value:
        return Value(self.run, self.run.record.add(kind, x=self.node, **fields), ndim)

    def _take(self, index: object) -> Value:
        if isinstance(index, Operand):
            return self.take(index)
        parts = slices(index, self.ndim)
        value = self
        for axis, part in enumerate(parts):
            if isinstance(part, list):
                value = value.take(part, axis)
        plain = [None if isinstance(part, list) else part for part in parts]
        if not any(part is not None for part in plain):
            return value
        dropped = sum(isinstance(part, int) for part in plain)
        return value._make(wire.Slice, fewer(value.ndim, dropped), index=tuple(plain))


class Compared(Value):
    """A comparison: 1 where it holds. As ``gate=`` it is decided for each token."""

    __slots__ = ("_latch", "_left", "_op", "_threshold")

    def __init__(
        self,
        run: Scope,
        node: int,
        ndim: int | None,
        op: Compare,
        left: Value,
        threshold: float,
    ) -> None:
        super().__init__(run, node, ndim)
        self._op = op
        self._left = left
        self._threshold = threshold
        self._latch = False

    def latch(self) -> Compared:
        """Return the gate that stays open once it was."""
        copy = Compared(self.run, self.node, self.ndim, self._op, self._left, self._threshold)
        copy._latch = True
        return copy

    def gate(self) -> int:
        """Record the gate and return its node."""
        if self._op == "eq":
            raise refuse("A gate compares by >, >=, < or <=.")
        return self.run.record.add(
            wire.Gate, x=self._left.node, cmp=self._op, threshold=self._threshold, latch=self._latch
        )


class Saved(Value):
    """A value that comes back: ``.value`` is its array once the trace is over."""

    __slots__ = ("is_whole", "name")

    def __init__(self, value: Value, name: str, *, is_whole: bool) -> None:
        super().__init__(value.run, value.node, value.ndim)
        self.name = name
        self.is_whole = is_whole

    @property
    def value(self) -> Array:
        """The array; bfloat16 as float32.

        Raises:
            TraceError: The trace is not over, or has failed.
        """
        found = self.run.result.arrays.get(self.name)
        if found is None:
            raise refuse(
                f"{self.name!r} was given no value in any step that was run: what it needs was"
                " never all there at once."
            )
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array, once the trace is over."""
        return tuple(self.value.shape)

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The token positions along the first axis, if that axis has them."""
        return self.run.result.positions(self.name)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        import numpy as np

        return np.array(self.value, dtype=dtype, copy=copy)

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        if not self.run.is_done:
            return super().__repr__()
        return f"<Saved {self.name!r} {list(self.shape)} {self.value.dtype}>"


class TopKArrays(NamedTuple):
    """The largest values and where they are."""

    values: Array
    indices: Array


class TopK(NamedTuple):
    """The largest values and where they are, in a trace."""

    values: Value
    indices: Value

    def save(self, name: str | None = None) -> SavedTopK:
        """Return both to this program when the trace is over."""
        run = self.values.run
        name = name or run.new_name()
        return SavedTopK(run.keep(self.values, f"{name}.values"), run.keep(self.indices, name))


class SavedTopK(NamedTuple):
    """Both, once the trace is over."""

    values: Saved
    indices: Saved

    @property
    def value(self) -> TopKArrays:
        """The arrays."""
        return TopKArrays(self.values.value, self.indices.value)
