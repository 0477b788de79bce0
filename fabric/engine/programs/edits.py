"""What a write makes of the numbers it finds at a point.

Shapes: h [T, ...] as selected; v, x and masks broadcast into it; gates are one number a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fabric.messages import nodes as ops

_TINY = 1e-12


def changed(node: ops.Node, h: Tensor, args: dict[str, Tensor]) -> Tensor:
    """Return what stands at the point after a node, in the dtype of ``h``.

    Args:
        node: A write, projection, clamp or skip.
        h: What stood there, as far as the node's selector takes it.
        args: The values of its ``x``, ``v``, ``mask`` and ``gate``, those it has.
    """
    gate = _per_token(args["gate"], h) if "gate" in args else None
    match node:
        case ops.Write(mode="add", norm="none") if gate is None and "mask" not in args:
            return (
                h + _like(args["x"], h) * node.alpha
                if node.alpha != 1.0
                else h + _like(args["x"], h)
            )
        case ops.Write():
            return _written(node, h, args, gate)
        case ops.Project(c=c):
            unit, along = _along(h, args["v"])
            strength = (c - 1.0) if gate is None else gate * (c - 1.0)
            return h + strength * along * unit
        case ops.Clamp(lo=lo, hi=hi, s=s):
            unit, along = _along(h, args["v"])
            moved = (along.clamp(lo, hi) - along) * s
            return h + (moved if gate is None else gate * moved) * unit
        case ops.Skip():
            return _like(args["x"], h).expand_as(h)
    raise TypeError(f"{node.op} changes nothing")


def _written(node: ops.Write, h: Tensor, args: dict[str, Tensor], gate: Tensor | None) -> Tensor:
    mask = _like(args["mask"], h) if "mask" in args else None
    if node.mode == "scale":
        strength = _times(_times(node.alpha - 1.0, mask), gate)
        return h * (1.0 + strength)
    x = _like(args["x"], h)
    alpha = _times(_times(node.alpha, mask), gate)
    if node.mode == "set":
        if isinstance(alpha, float) and alpha == 1.0:
            return x.expand_as(h)
        if not h.dtype.is_floating_point:
            return torch.where(torch.as_tensor(alpha) != 0, x, h)
        # Where nothing is left of h, nothing of it may matter: -inf times 0 is no number.
        kept = torch.where(torch.as_tensor(alpha == 1.0), torch.zeros_like(h), (1.0 - alpha) * h)
        return kept + torch.where(torch.as_tensor(alpha == 0.0), torch.zeros_like(h), alpha * x)
    if node.norm == "match":
        x = x.expand_as(h)  # what is broadcast is given the length of h as a whole
        x = x * (_length(h) / _length(x).clamp_min(_TINY))
    y = h + alpha * x
    return y * (_length(h) / _length(y).clamp_min(_TINY)) if node.norm == "preserve" else y


def _along(h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vector of ``v`` and how much of ``h`` lies along it, [..., 1]."""
    v = _like(v, h)
    unit = v / _length(v).clamp_min(_TINY)
    return unit, (h * unit).sum(-1, keepdim=True)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _like(x: Tensor, h: Tensor) -> Tensor:
    return x if x.dtype == h.dtype and x.device == h.device else x.to(h)


def _per_token(gate: Tensor, h: Tensor) -> Tensor:
    """Return a gate of one number a token so that it broadcasts over ``h``."""
    gate = _like(gate, h) if h.dtype.is_floating_point else gate
    return gate.reshape(-1, *[1] * (h.dim() - 1)) if gate.dim() else gate


def _times(strength: float | Tensor, factor: Tensor | None) -> float | Tensor:
    return strength if factor is None else strength * factor
