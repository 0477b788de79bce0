"""The plain meaning of pure nodes and of changes, in torch: part of the oracle of programs.

It shares no code with the engine or with the checks: each operation is written down as its
docstring in ``fabric.messages.nodes`` says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fabric.messages import nodes as n

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "bool": torch.bool,
}
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Known:
    """A value, and the token positions of its first axis, where it has them."""

    x: Tensor
    at: tuple[int, ...] | None = None


def pure(node: n.Node, args: Sequence[Known], index: int) -> Known:
    """Return what a pure node gives. ``index`` is its own, which noise depends on."""
    x = _result(node, [arg.x for arg in args], args, index)
    return Known(x, _positions(node, args, x))


def changed(node: n.Node, h: Tensor, args: Mapping[str, Tensor]) -> Tensor:
    """Return what takes the place of ``h``, [T, ...], the selection at a point."""
    gate = torch.ones(())
    if "gate" in args:
        gate = args["gate"].reshape(-1, *[1] * (h.dim() - 1)).to(torch.float32)
    match node:
        case n.Skip():
            return args["x"].to(h.dtype).expand_as(h)
        case n.Write(mode="set") if not h.dtype.is_floating_point:
            return torch.where(gate != 0, args["x"].expand_as(h), h)
        case n.Write(alpha=alpha, mode=mode, norm=norm):
            strength = gate * args.get("mask", torch.ones(())).to(torch.float32)
            if mode == "scale":
                return h * (1 + strength * (alpha - 1))
            x = args["x"].to(h.dtype).expand_as(h)
            if mode == "set":
                a = strength * alpha
                # A whole replacement holds even where what it replaces is infinite.
                return torch.where(a == 1, x, torch.where(a == 0, h, (1 - a) * h + a * x))
            if norm == "match":
                x = x * _length(h) / _length(x).clamp_min(TINY)
            y = h + strength * alpha * x
            return y * _length(h) / _length(y).clamp_min(TINY) if norm == "preserve" else y
        case n.Project(c=c):
            v = _unit(args["v"].to(h.dtype))
            return h + gate * (c - 1) * (h * v).sum(-1, keepdim=True) * v
        case n.Clamp(lo=lo, hi=hi, s=s):
            v = _unit(args["v"].to(h.dtype))
            along = (h * v).sum(-1, keepdim=True)
            return h + gate * s * (along.clamp(lo, hi) - along) * v
    raise TypeError(f"{node.op} changes nothing")


def sliced(x: Tensor, index: Sequence[int | tuple[int | None, int | None] | None]) -> Tensor:
    """Return ``x[index]`` as the wire writes an index."""
    picks: list[int | slice] = []
    for entry in index:
        match entry:
            case None:
                picks.append(slice(None))
            case int():
                picks.append(entry)
            case (begin, end):
                picks.append(slice(begin, end))
    return x[tuple(picks)]


def reduced(how: str, x: Tensor) -> Tensor:
    """Return a save's reduction over its first axis."""
    match how:
        case "mean":
            return x.mean(0)
        case "sum":
            return x.sum(0)
        case "max":
            return x.amax(0)
        case "last":
            return x[-1]
        case _:
            return x.square().sum(0).sqrt()


def noise(node: n.Noise, index: int, like: Known) -> Tensor:
    """Return normal noise, a row for each position.

    Source: Salmon et al. 2011 (Philox), as NumPy has it.
    """
    x = like.x

    def row(position: int, shape: tuple[int, ...]) -> np.ndarray:
        stream = np.random.Philox(key=[node.seed, index], counter=[0, 0, 0, position])
        drawn = np.random.Generator(stream).standard_normal(shape)
        return np.asarray(drawn * node.sigma, dtype=np.float32)

    if x.dim() == 0:
        made = torch.from_numpy(row(0, ()))
    else:
        at = like.at if like.at is not None else tuple(range(x.shape[0]))
        rows = [torch.from_numpy(row(position, tuple(x.shape[1:]))) for position in at]
        made = torch.stack(rows) if rows else torch.zeros(x.shape)
    return made.to(x.dtype if x.dtype.is_floating_point else torch.float32)


def _result(node: n.Node, x: list[Tensor], args: Sequence[Known], index: int) -> Tensor:
    match node:
        case n.Unary():
            return _unary(node, x[0])
        case n.Binary():
            return _binary(node.op, x[0], x[1] if node.k is None else node.k)
        case n.Matmul():
            left, right = _of_one_dtype(x)
            return left @ right
        case n.Linear():
            x = _of_one_dtype(x)
            return x[0] @ x[1].T + (x[2] if len(x) == 3 else 0)
        case n.Einsum():
            return torch.einsum(node.equation, *_of_one_dtype(x))
        case n.Reduce():
            return _reduce(node, x[0])
        case n.Cosine():
            left, right = torch.broadcast_tensors(*_of_one_dtype(x))
            return F.cosine_similarity(left, right, dim=node.axis, eps=1e-8)
        case n.Softmax(op="softmax"):
            return x[0].float().softmax(node.axis)
        case n.Softmax():
            return x[0].float().log_softmax(node.axis)
        case n.TopK():
            values, indices = x[0].topk(node.k, dim=-1)
            return values if node.part == "values" else indices
        case n.Where():
            return torch.where(x[0] != 0, x[1], x[2])
        case n.Slice():
            return sliced(x[0], node.index)
        case n.Gather():
            by = x[1] if node.indices is None else torch.tensor(node.indices)
            by = by % x[0].shape[node.axis] if by.numel() else by.long()
            if by.dim() == 1:
                return x[0].index_select(node.axis, by)
            return torch.gather(x[0], node.axis, by)
        case n.Concat(op="concat"):
            return torch.cat(x, node.axis)
        case n.Concat():
            return torch.stack(x, node.axis)
        case n.Reshape(op="reshape"):
            return x[0].reshape(node.shape)
        case n.Reshape():
            return x[0].permute(node.shape)
        case n.Cast():
            return x[0].to(DTYPES[node.dtype])
        case n.Noise():
            return noise(node, index, args[0])
        case n.Gate():
            compared: Tensor = getattr(torch, node.cmp)(x[0].reshape(-1), node.threshold)
            return compared.to(torch.float32)
    raise TypeError(f"{node.op} is not pure")


def _unary(node: n.Unary, x: Tensor) -> Tensor:
    match node.op:
        case "relu":
            return x.clamp_min(0)
        case "jumprelu":
            return torch.where(x > node.threshold, x, torch.zeros_like(x))
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return x * torch.sigmoid(x)
        case "abs" | "neg" | "sqrt" | "rsqrt" | "exp" | "log" | "tanh" | "sigmoid":
            made: Tensor = getattr(torch, node.op)(x)
            return made


def _binary(op: str, x: Tensor, y: Tensor | float) -> Tensor:
    other = y if isinstance(y, Tensor) else torch.tensor(float(y))
    made: Tensor = getattr(torch, op)(x, other)
    return made


def _reduce(node: n.Reduce, x: Tensor) -> Tensor:
    axes = [axis % x.dim() for axis in node.axes] or list(range(x.dim()))
    if not axes:
        axes, x = [0], x.reshape(1)
        return _over(node, x, axes, keepdim=False)
    return _over(node, x, axes, keepdim=node.keepdim)


def _over(node: n.Reduce, x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    match node.op:
        case "sum":
            return x.sum(axes, keepdim=keepdim)
        case "mean":
            return x.mean(axes, keepdim=keepdim)
        case "max":
            return x.amax(axes, keepdim=keepdim)
        case "min":
            return x.amin(axes, keepdim=keepdim)
        case "var":
            return (x - x.mean(axes, keepdim=True)).square().mean(axes, keepdim=keepdim)
        case "norm":
            return x.square().sum(axes, keepdim=keepdim).sqrt()
        case "logsumexp":
            return x.logsumexp(axes, keepdim=keepdim)
        case "argmax":
            return x.argmax(axes[0], keepdim=keepdim)


def _of_one_dtype(x: list[Tensor]) -> list[Tensor]:
    dtype = x[0].dtype
    for other in x[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return [each.to(dtype) for each in x]


def _length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def _unit(v: Tensor) -> Tensor:
    return v / _length(v).clamp_min(TINY)


def _positions(node: n.Node, args: Sequence[Known], x: Tensor) -> tuple[int, ...] | None:
    """Return the positions of a result's first axis: from the first operand that leads it."""
    leading = list(args)
    match node:
        case n.Einsum(equation=equation):
            taken, _, result = equation.partition("->")
            leading = [
                arg
                for arg, operand in zip(args, taken.split(","), strict=True)
                if result and operand[:1] == result[0]
            ]
            return next((arg.at for arg in leading if arg.at is not None), None)
        case n.Matmul() if args[1].x.dim() <= 2:
            leading = [args[0]]
        case n.Linear() | n.Gather():
            leading = [args[0]]
        case n.Concat():
            leading = [args[0]]
    cut = (
        (isinstance(node, n.Slice) and bool(node.index) and node.index[0] is not None)
        or (isinstance(node, n.Gather) and node.axis % args[0].x.dim() == 0)
        or (isinstance(node, n.Concat) and node.axis % x.dim() == 0)
        or (isinstance(node, n.Cosine) and node.axis % (x.dim() + 1) == 0)
        or (node.op == "permute" and getattr(node, "shape", ())[:1] != (0,))
        or (isinstance(node, n.TopK) and x.dim() == 1)
    )
    if isinstance(node, n.Reduce):
        axes = {axis % args[0].x.dim() for axis in node.axes}
        cut = not axes or 0 in axes
    if cut or x.dim() == 0:
        return None
    same_rank = isinstance(node, n.Binary | n.Where | n.Matmul | n.Linear)
    for arg in leading:
        if same_rank and arg.x.dim() != x.dim():
            continue
        if arg.at is not None and len(arg.at) == x.shape[0]:
            return arg.at
    return None
