"""What a node's value is, and the pure computations between reads and writes.

Shapes: any; axis 0 of a value with ``at`` holds those token positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fabric.messages import nodes as ops

MAX_VALUE_BYTES = 2**30
"""Of one value that a node computes."""

_RISKY = 2**26
"""Numbers that a node's arguments could multiply to before its result's shape is looked at."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "bool": torch.bool,
}

Positions = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor, and the token positions that its first axis stands for, if it does."""

    data: Tensor
    at: Positions | None = None


class Oversized(ValueError):
    """A value would take more than ``MAX_VALUE_BYTES``; the caller knows whose."""

    def __init__(self, size: int) -> None:
        super().__init__(f"a value would take {size} bytes")
        self.size = size


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "abs": torch.abs,
    "neg": torch.neg,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
}


def arguments(node: ops.Node) -> tuple[int, ...]:
    """Return the nodes whose values a node takes, in the order ``evaluate`` wants them."""
    match node:
        case ops.Einsum() | ops.Concat():
            return node.args
        case ops.Binary(x=x, y=y):
            return (x,) if y is None else (x, y)
        case ops.Matmul(x=x, y=y) | ops.Cosine(x=x, y=y):
            return (x, y)
        case ops.Linear(x=x, weight=weight, bias=bias):
            return (x, weight) if bias is None else (x, weight, bias)
        case ops.Where(cond=cond, x=x, y=y):
            return (cond, x, y)
        case ops.Gather(x=x, by=by):
            return (x,) if by is None else (x, by)
        case ops.Noise(like=like):
            return (like,)
        case ops.Grad(scalar=scalar):
            return (scalar,)
        case ops.Write(x=x, mask=mask, gate=gate):
            return tuple(ref for ref in (x, mask, gate) if ref is not None)
        case ops.Project(v=v, gate=gate) | ops.Clamp(v=v, gate=gate):
            return (v,) if gate is None else (v, gate)
        case (
            ops.Read() | ops.Const() | ops.Zeros() | ops.Saved() | ops.Artifact()
            | ops.TokenRows() | ops.WeightRead()
        ):  # fmt: skip
            return ()
        case _:
            return (node.x,)


def evaluate(node: ops.Node, args: Sequence[Value]) -> Value:
    """Return the value of a pure node.

    Raises:
        Oversized: It would be too large to be made.
    """
    data = [arg.data for arg in args]
    if math.prod(max(1, x.numel()) for x in data) > _RISKY:
        made = _compute(node, [x.detach().to("meta") for x in data])
        if (size := made.numel() * made.element_size()) > MAX_VALUE_BYTES:
            raise Oversized(size)
    result = _compute(node, data)
    return Value(result, _positions(node, args, result))


def zeros(node: ops.Zeros) -> Value:
    """Return what a node of this kind stands for, in float32.

    Raises:
        Oversized: It would be too large to be made.
    """
    if (size := 4 * math.prod(node.shape)) > MAX_VALUE_BYTES:
        raise Oversized(size)
    return Value(torch.full(node.shape, node.fill, dtype=torch.float32))


def noise(node: ops.Noise, index: int, like: Value) -> Value:
    """Return normal noise in the shape of ``like``: of a position the same in any batch.

    Source: Philox4x64-10 (Salmon et al. 2011), as NumPy implements it.
    """
    x = like.data
    key = np.array([node.seed, index], dtype=np.uint64)

    def draw(position: int, shape: tuple[int, ...]) -> np.ndarray:
        counter = np.array([0, 0, 0, position], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(
            shape
        )

    if x.dim() == 0:
        drawn = draw(0, ())
    else:
        at = like.at or range(x.shape[0])
        rows = [draw(position, tuple(x.shape[1:])) for position in at]
        drawn = np.stack(rows) if rows else np.zeros(tuple(x.shape))
    scaled = torch.as_tensor(np.asarray(drawn) * node.sigma, dtype=torch.float32)
    return Value(scaled.to(x.dtype if x.dtype.is_floating_point else torch.float32), like.at)


def indexed(x: Tensor, index: Sequence[object]) -> Tensor:
    """Return ``x[index]``: integers drop their axis, pairs are ranges, null takes all."""
    return x[tuple(slice(*i) if isinstance(i, tuple) else slice(None) if i is None else i
                   for i in index)]  # fmt: skip


def _compute(node: ops.Node, data: Sequence[Tensor]) -> Tensor:
    match node:
        case ops.Unary(op="jumprelu", threshold=threshold):
            return data[0] * (data[0] > threshold)
        case ops.Unary(op=op):
            return _UNARY[op](data[0])
        case ops.Binary(op=op, k=k):
            x = data[0]
            return _BINARY[op](x, data[1] if k is None else torch.tensor(k, device=x.device))
        case ops.Matmul():
            return torch.matmul(*_joined(data))
        case ops.Linear():
            return F.linear(*_joined(data))
        case ops.Einsum(equation=equation):
            return torch.einsum(equation, *_joined(data))
        case ops.Reduce():
            return _reduce(node, data[0])
        case ops.Cosine(axis=axis):
            return F.cosine_similarity(*_joined(data), dim=axis)
        case ops.Softmax(op=op, axis=axis):
            function = torch.softmax if op == "softmax" else torch.log_softmax
            return function(data[0].float(), axis)
        case ops.TopK(k=k, part=part):
            top = data[0].topk(k, -1)
            return top.values if part == "values" else top.indices
        case ops.Where():
            return torch.where(data[0] != 0, data[1], data[2])
        case ops.Slice(index=index):
            return indexed(data[0], index)
        case ops.Gather(axis=axis, indices=indices):
            by = data[1] if indices is None else torch.tensor(indices, device=data[0].device)
            return _gather(data[0], axis, by.long())
        case ops.Concat(op=op, axis=axis):
            return torch.cat(list(data), axis) if op == "concat" else torch.stack(list(data), axis)
        case ops.Reshape(op=op, shape=shape):
            return data[0].reshape(shape) if op == "reshape" else data[0].permute(shape)
        case ops.Cast(dtype=dtype):
            return data[0].to(DTYPES[dtype])
    raise TypeError(f"{node.op} is no pure computation")


def _joined(data: Sequence[Tensor]) -> list[Tensor]:
    """Return the operands of a product in one dtype: constants meet the model's own."""
    dtype = data[0].dtype
    for x in data[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    return [x.to(dtype) for x in data]


def _gather(x: Tensor, axis: int, by: Tensor) -> Tensor:
    axis %= x.dim()
    by = torch.where(by < 0, by + x.shape[axis], by)
    return x.index_select(axis, by) if by.dim() == 1 else x.take_along_dim(by, axis)


def _reduce(node: ops.Reduce, x: Tensor) -> Tensor:
    axes, keep = node.axes or tuple(range(x.dim())), node.keepdim
    match node.op:
        case "sum":
            return x.sum(axes, keepdim=keep)
        case "mean":
            return x.mean(axes, keepdim=keep)
        case "max":
            return x.amax(axes, keepdim=keep)
        case "min":
            return x.amin(axes, keepdim=keep)
        case "var":
            return x.var(axes, correction=0, keepdim=keep)
        case "norm":
            return torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
        case "logsumexp":
            return torch.logsumexp(x, axes, keepdim=keep)
        case "argmax":
            return x.argmax(node.axes[0] if node.axes else None, keepdim=keep)


def _positions(node: ops.Node, args: Sequence[Value], result: Tensor) -> Positions | None:
    """Return the token positions that axis 0 of a result stands for, if it still does."""
    if result.dim() == 0:
        return None
    first = args[0]
    rank = first.data.dim()
    match node:
        case ops.Binary() | ops.Where():
            full = [a.at for a in args if a.at and a.data.dim() == result.dim()]
            return next((at for at in full if len(at) == result.shape[0]), None)
        case ops.Matmul():
            # y's rows are summed over: of y only a batch axis stays.
            kept = [first] if rank > 1 else []
            kept += [args[1]] if args[1].data.dim() > 2 else []
            full = [a.at for a in kept if a.at and a.data.dim() == result.dim()]
            return next((at for at in full if len(at) == result.shape[0]), None)
        case ops.Linear() | ops.TopK():
            return first.at if rank > 1 else None
        case ops.Cosine(axis=axis):
            return first.at if axis % rank else None
        case ops.Reduce(axes=axes):
            return first.at if axes and all(axis % rank for axis in axes) else None
        case ops.Einsum(equation=equation):
            inputs, output = equation.split("->")
            for names, arg in zip(inputs.split(","), args, strict=True):
                if arg.at and names[:1] == output[:1]:
                    return arg.at
            return None
        case ops.Slice(index=index):
            return first.at if not index or index[0] is None else None
        case ops.Gather(axis=axis):
            return first.at if axis % rank else None
        case ops.Concat(axis=axis):
            return first.at if axis % result.dim() else None
        case ops.Reshape(op="reshape"):
            return first.at if result.shape[0] == first.data.shape[0] else None
        case ops.Reshape(shape=shape):
            return first.at if shape[0] % rank == 0 else None
        case _:
            return first.at


def reduced(node: ops.Save, value: Value) -> Value:
    """Return what a save keeps of a value, [positions, ...]."""
    x = value.data
    match node.reduce:
        case None:
            return value
        case "last":
            return Value(x[-1])
        case "norm":
            return Value(torch.linalg.vector_norm(x.float(), dim=0).to(x.dtype))
        case "mean":
            return Value(x.mean(0) if x.dtype.is_floating_point else x.float().mean(0))
        case "sum":
            return Value(x.sum(0))
        case "max":
            return Value(x.amax(0))
