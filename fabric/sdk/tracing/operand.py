"""What can be computed with in a trace, written like numpy arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from fabric.messages import nodes as wire
from fabric.messages.nodes import DType
from fabric.sdk.tracing.lines import refuse

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array
    from fabric.sdk.tracing.values import Compared, Saved, TopK, Value

Compare = Literal["gt", "ge", "lt", "le", "eq"]
Axes: TypeAlias = int | Sequence[int] | None

_TORCH = {name: f"__{name}__" for name in ("add", "sub", "mul", "matmul", "gt", "ge", "lt", "le")}
_TORCH |= {"div": "__truediv__", "true_divide": "__truediv__", "rsub": "__rsub__"}
_UFUNCS = {
    **{"add": "__add__", "subtract": "__sub__", "multiply": "__mul__", "divide": "__truediv__"},
    **{"matmul": "__matmul__", "greater": "__gt__", "greater_equal": "__ge__", "less": "__lt__"},
    **{"less_equal": "__le__", "equal": "__eq__", "negative": "__neg__", "absolute": "__abs__"},
    **{name: name for name in ("exp", "log", "sqrt", "tanh", "maximum", "minimum")},
}


class Operand(ABC):
    """What can be computed with: a value, or a place whose value is read when it is needed."""

    __slots__ = ()
    __hash__ = object.__hash__

    @abstractmethod
    def _value(self) -> Value:
        """Return the value; that of a place is read now."""

    def save(
        self,
        name: str | None = None,
        *,
        dtype: DType | None = None,
        reduce: Literal["mean", "sum", "max", "last", "norm"] | None = None,
        stream: bool = False,
    ) -> Saved:
        """Return it to this program when the trace is over, as ``.value``.

        Args:
            name: In the result; made up where it is left out.
            dtype: What it is cast to.
            reduce: Over its first axis, where the model is.
            stream: Send each step's as soon as it is there.
        """
        value = self._value()
        return value.run.keep(value, name, dtype=dtype, reduce=reduce, stream=stream)

    def clone(self) -> Value:
        """Return the value as it is before any later line changes the place it is read from."""
        return self._value()

    def __add__(self, other: object) -> Value:
        return self._binary("add", other)

    __radd__ = __add__

    def __sub__(self, other: object) -> Value:
        return self._binary("sub", other)

    def __rsub__(self, other: object) -> Value:
        return self._value().run.value(other)._binary("sub", self)

    def __mul__(self, other: object) -> Value:
        return self._binary("mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> Value:
        return self._binary("div", other)

    def __rtruediv__(self, other: object) -> Value:
        return self._value().run.value(other)._binary("div", self)

    def __neg__(self) -> Value:
        return self._unary("neg")

    def __abs__(self) -> Value:
        return self._unary("abs")

    def __pow__(self, power: object) -> Value:
        value = self._value()
        if power in (0.5, -0.5):
            return value._unary("sqrt" if power == 0.5 else "rsqrt")
        if power not in (1, 2, 3, 4):
            raise refuse(f"The power {power!r} is not one of 1 to 4, 0.5 and -0.5.")
        product = value
        for _ in range(int(str(power)[0]) - 1):
            product = product * value
        return product

    def __matmul__(self, other: object) -> Value:
        value = self._value()
        right = value.run.value(other)
        if 1 in (value.ndim, right.ndim) and value.ndim and right.ndim:
            return value.run.einsum(_vector_product(value.ndim, right.ndim), value, right)
        ndim = broadcast(value.ndim, right.ndim)
        return value._make(wire.Matmul, ndim, y=value.run.ref(right))

    def __rmatmul__(self, other: object) -> Value:
        return self._value().run.value(other) @ self

    def __gt__(self, other: object) -> Compared:
        return self._compare("gt", other)

    def __ge__(self, other: object) -> Compared:
        return self._compare("ge", other)

    def __lt__(self, other: object) -> Compared:
        return self._compare("lt", other)

    def __le__(self, other: object) -> Compared:
        return self._compare("le", other)

    def __eq__(self, other: object) -> Compared:  # type: ignore[override]
        return self._compare("eq", other)

    def __getitem__(self, index: object) -> Value:
        return self._value()._take(index)

    def __bool__(self) -> NoReturn:
        raise refuse(
            "A traced value is not computed yet, so it has no truth: `if`, `and` and `while` cannot"
            " depend on it. Multiply by a comparison, or give `gate=` to what changes a place."
        )

    def __iter__(self) -> Iterator[Value]:
        raise refuse(
            "A traced value is not computed yet, so it cannot be looped over or unpacked. Compute"
            " with whole axes, or loop over numbers and index it."
        )

    def __len__(self) -> int:
        raise refuse("A traced value is not computed yet, so it has no length.")

    def __float__(self) -> float:
        raise refuse(
            "A traced value is not computed yet; `.save()` it and use `.value` afterwards."
        )

    __int__ = __float__
    __index__ = __float__

    def __array__(self, dtype: object = None, copy: object = None) -> Array:
        raise refuse(
            "A traced value is not computed yet, so numpy cannot have it: use the methods of the"
            " value itself, or `.save()` it and use `.value` afterwards."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Value:
        name = _UFUNCS.get(ufunc.__name__, "")
        if method != "__call__" or options or not name:
            raise refuse(
                f"numpy's {ufunc.__name__} cannot be computed where the model is; there are"
                f" {', '.join(sorted(_UFUNCS))}, and the methods of the value itself."
            )
        first, *rest = inputs
        made: Value = getattr(self._value().run.value(first), name)(*rest)
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Value:
        """Let torch leave the arithmetic with its tensors to us."""
        name = _TORCH.get(getattr(function, "__name__", ""), "")
        ours = next((arg for arg in args if isinstance(arg, Operand)), None)
        if ours is None or kwargs or not name:
            raise refuse(
                "torch cannot compute with a traced value; use the methods of the value itself."
            )
        first, *rest = args
        made: Value = getattr(ours._value().run.value(first), name)(*rest)
        return made

    def relu(self) -> Value:
        """max(x, 0)."""
        return self._unary("relu")

    def jumprelu(self, threshold: float) -> Value:
        """x where it is over the threshold, else 0."""
        return self._unary("jumprelu", threshold=threshold)

    def gelu(self, *, tanh: bool = False) -> Value:
        """x·Φ(x), exactly or by the approximation with tanh."""
        return self._unary("gelu_tanh" if tanh else "gelu")

    def silu(self) -> Value:
        """x·sigmoid(x)."""
        return self._unary("silu")

    def sigmoid(self) -> Value:
        """1 / (1 + exp(-x))."""
        return self._unary("sigmoid")

    def tanh(self) -> Value:
        """Hyperbolic tangent."""
        return self._unary("tanh")

    def exp(self) -> Value:
        """Natural exponential."""
        return self._unary("exp")

    def log(self) -> Value:
        """Natural logarithm."""
        return self._unary("log")

    def sqrt(self) -> Value:
        """Square root."""
        return self._unary("sqrt")

    def sum(self, axis: Axes = None, *, keepdims: bool = False) -> Value:
        """Sum over axes; over all without any."""
        return self._reduce("sum", axis, keepdims)

    def mean(self, axis: Axes = None, *, keepdims: bool = False) -> Value:
        """Mean over axes; over all without any."""
        return self._reduce("mean", axis, keepdims)

    def max(self, axis: Axes = None, *, keepdims: bool = False) -> Value:
        """Largest over axes; over all without any."""
        return self._reduce("max", axis, keepdims)

    def min(self, axis: Axes = None, *, keepdims: bool = False) -> Value:
        """Least over axes; over all without any."""
        return self._reduce("min", axis, keepdims)

    def var(self, axis: Axes = None, *, keepdims: bool = False) -> Value:
        """Variance over axes; over all without any."""
        return self._reduce("var", axis, keepdims)

    def norm(self, axis: Axes = -1, *, keepdims: bool = False) -> Value:
        """Euclidean length along the last axis, or over others."""
        return self._reduce("norm", axis, keepdims)

    def logsumexp(self, axis: Axes = -1, *, keepdims: bool = False) -> Value:
        """log Σ exp along the last axis, or over others."""
        return self._reduce("logsumexp", axis, keepdims)

    def argmax(self, axis: int = -1, *, keepdims: bool = False) -> Value:
        """Where the largest is."""
        return self._reduce("argmax", axis, keepdims)

    def softmax(self, axis: int = -1) -> Value:
        """Softmax, in float32."""
        value = self._value()
        return value._make(wire.Softmax, value.ndim, op="softmax", axis=axis)

    def log_softmax(self, axis: int = -1) -> Value:
        """Logarithm of the softmax, in float32."""
        value = self._value()
        return value._make(wire.Softmax, value.ndim, op="log_softmax", axis=axis)

    def cosine(self, other: object, axis: int = -1) -> Value:
        """The cosine between two values along an axis."""
        value = self._value()
        ndim = broadcast(value.ndim, value.run.value(other).ndim)
        return value._make(wire.Cosine, fewer(ndim, 1), y=value.run.ref(other), axis=axis)

    def topk(self, k: int) -> TopK:
        """The ``k`` largest along the last axis, and where they are."""
        return self._value().top(k)

    def linear(self, weight: object, bias: object = None) -> Value:
        """x @ weightᵀ + bias."""
        value = self._value()
        ref = value.run.ref
        extra = {} if bias is None else {"bias": ref(bias)}
        return value._make(wire.Linear, value.ndim, weight=ref(weight), **extra)

    def take(self, indices: object, axis: int = 0) -> Value:
        """Entries along an axis, by a list of numbers or by another value."""
        value = self._value()
        if isinstance(indices, Operand):
            return value._make(wire.Gather, value.ndim, axis=axis, by=value.run.ref(indices))
        return value._make(wire.Gather, value.ndim, axis=axis, indices=_integers(indices))

    def reshape(self, *shape: int) -> Value:
        """The same numbers in another shape; one -1 is worked out."""
        return self._value()._make(wire.Reshape, len(shape), op="reshape", shape=shape)

    def permute(self, *axes: int) -> Value:
        """The axes in another order."""
        return self._value()._make(wire.Reshape, len(axes), op="permute", shape=axes)

    def unsqueeze(self, axis: int) -> Value:
        """With a new axis of length 1."""
        value = self._value()
        return value.run.stack([value], axis)

    def cast(self, dtype: DType) -> Value:
        """In another dtype."""
        value = self._value()
        return value._make(wire.Cast, value.ndim, dtype=dtype)

    def where(self, condition: object, other: object) -> Value:
        """x where the condition holds, else the other."""
        value = self._value()
        run = value.run
        ndim = broadcast(value.ndim, run.value(other).ndim)
        return value._make(wire.Where, ndim, cond=run.ref(condition), y=run.ref(other))

    def maximum(self, other: object) -> Value:
        """The larger of each two entries."""
        return self._binary("maximum", other)

    def minimum(self, other: object) -> Value:
        """The lesser of each two entries."""
        return self._binary("minimum", other)

    def _unary(self, op: str, **fields: object) -> Value:
        value = self._value()
        return value._make(wire.Unary, value.ndim, op=op, **fields)

    def _binary(self, op: str, other: object) -> Value:
        value = self._value()
        if isinstance(other, int | float) and not isinstance(other, bool):
            return value._make(wire.Binary, value.ndim, op=op, k=float(other))
        right = value.run.value(other)
        ndim = broadcast(value.ndim, right.ndim)
        return value._make(wire.Binary, ndim, op=op, y=value.run.ref(right))

    def _reduce(self, op: str, axis: Axes, keepdims: bool) -> Value:
        value = self._value()
        axes = () if axis is None else _integers([axis] if isinstance(axis, int) else axis)
        ndim = value.ndim if keepdims else fewer(value.ndim, len(axes) or value.ndim or 0)
        return value._make(wire.Reduce, ndim, op=op, axes=axes, keepdim=keepdims)

    def _compare(self, op: Compare, other: object) -> Compared:
        return self._value().compared(op, other)


def _integers(numbers: Any) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in numbers)
    except (TypeError, ValueError):
        raise refuse(f"{numbers!r} are not whole numbers.") from None


def fewer(ndim: int | None, by: int) -> int | None:
    """Return a number of axes less some, if it is known."""
    return None if ndim is None else max(ndim - by, 0)


def broadcast(first: int | None, second: int | None) -> int | None:
    """Return the axes of two values that broadcast, if both are known."""
    return None if first is None or second is None else max(first, second)


def _vector_product(first: int, second: int) -> str:
    """Return numpy's product with a vector as a sum over letters."""
    letters = "abcdefgh"
    left = letters[: first - 1] + "z"
    if second == 1:
        return f"{left},z->{left[:-1]}"
    right = letters[: second - 2] + "z" + letters[second - 2]
    return f"{left},{right}->{right.replace('z', '')}"
