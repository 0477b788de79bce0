"""Linear layers with weights packed once for the CPU, siblings multiplied together.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fabric.engine.native import Native, load_native

_TYPICAL_ROWS = 32
"""The batch that oneDNN lays weights out for."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are given the same input."""


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer over a packed weight; the plain weight is given up.

    Hooks see what they would see on ``nn.Linear``: its input, and its own output.
    """

    def __init__(self, linear: nn.Linear, weight: _Packed, part: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = weight
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., in] times the weight, [..., out] in the same dtype."""
        return self._weight.part(self._part, x)


class _Packed:
    """The weight of one layer, or of siblings that are given the same input."""

    def __init__(self, linears: Sequence[nn.Linear], native: Native | None) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biased = any(linear.bias is not None for linear in linears)
        self._bias = torch.cat([_bias_of(linear) for linear in linears]) if biased else None
        self._sizes = [linear.out_features for linear in linears]
        self._num_outputs = sum(self._sizes)
        self._native = native
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
            if native is None
            else native.pack(weight)
        )
        self._members: list[PackedLinear] = []
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def layers(self, linears: Sequence[nn.Linear]) -> list[PackedLinear]:
        """Return the modules that take the linears' places."""
        self._members = [PackedLinear(linear, self, i) for i, linear in enumerate(linears)]
        return self._members

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return one layer's output; the siblings' wait for the same input."""
        if len(self._members) == 1:
            return self._multiply(x)
        if self._input is x and index in self._parts:
            part = self._parts.pop(index)
            if not self._parts:
                self._input = None
            return part
        parts = dict(enumerate(self._multiply(x).split(self._sizes, -1)))
        part = parts.pop(index)
        # A hook may change the input in place before a sibling reads it.
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self._members)
        self._input, self._parts = (None, {}) if hooked else (x, parts)
        return part

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._native is not None:
            out = self._native.linear(rows, self._weight, self._bias, self._num_outputs)
        else:
            out = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out.view(*x.shape[:-1], self._num_outputs)


def pack_linears(model: nn.Module) -> None:
    """Pack the model's bfloat16 linear layers where this CPU computes them natively.

    Weights are laid out once, not at every call. An embedding tied to a layer keeps its own copy.
    """
    native = load_native()
    if native is not None and not native.has_linear:
        native = None
    if native is None and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for names in list(_groups(model)):
        linears = [model.get_submodule(name) for name in names]
        packed = _Packed(linears, native)
        for name, layer in zip(names, packed.layers(linears), strict=True):
            model.set_submodule(name, layer)


def _groups(model: nn.Module) -> Iterator[list[str]]:
    """Name the layers to pack, siblings together."""
    for prefix, module in model.named_modules():
        children = [name for name, child in module.named_children() if _fits(child)]
        for siblings in _SIBLINGS:
            if set(siblings) <= set(children):
                children = [name for name in children if name not in siblings]
                yield [_path(prefix, name) for name in siblings]
        for name in children:
            yield [_path(prefix, name)]


def _fits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.in_features % 2 == 0
    )


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _bias_of(linear: nn.Linear) -> Tensor:
    if linear.bias is not None:
        return linear.bias.detach()
    return torch.zeros(linear.out_features, dtype=linear.weight.dtype)
