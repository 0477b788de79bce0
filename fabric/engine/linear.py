"""Linear layers with weights packed once for the CPU, siblings multiplied together.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fabric.engine.native import PANEL, Native, load_native

_TYPICAL_ROWS = 32
"""The batch that oneDNN lays weights out for."""

_TILE_ROWS = 16
"""Rows that torch multiplies at once where the batch may not change a row's result."""

Multiplier = Callable[[Tensor], Tensor]
"""x [M, K] -> y [M, N], both in the weight's dtype."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are given the same input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeWeight:
    """A weight as the kernels read it; calling it multiplies.

    ``packed`` and ``scales`` are as ``Native.linear`` takes them, ``bias`` [N] or ``None``.
    """

    native: Native
    packed: Tensor
    bias: Tensor | None
    num_inputs: int
    num_outputs: int
    scales: Tensor | None = None

    def __call__(self, x_MK: Tensor) -> Tensor:
        """Return ``x`` times the weight, [M, N]."""
        return self.native.linear(x_MK, self.packed, self.bias, self.num_outputs, self.scales)


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

    def native_weight(self, *siblings: PackedLinear) -> NativeWeight | None:
        """Return the weight of this layer and these siblings together, as the kernels read it;
        ``None`` where it is of others too, or read otherwise."""
        return self._weight.native((self, *siblings))


class _Packed:
    """The weight of one layer, or of siblings that are given the same input."""

    def __init__(self, linears: Sequence[nn.Linear], *, invariant: bool, int8: bool) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biased = any(linear.bias is not None for linear in linears)
        bias = torch.cat([_bias_of(linear) for linear in linears]) if biased else None
        self._sizes = [linear.out_features for linear in linears]
        self._num_outputs = sum(self._sizes)
        self._multiplier = get_multiplier(weight, bias, invariant=invariant, int8=int8)
        self._members: list[PackedLinear] = []
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def layers(self, linears: Sequence[nn.Linear]) -> list[PackedLinear]:
        """Return the modules that take the linears' places."""
        self._members = [PackedLinear(linear, self, i) for i, linear in enumerate(linears)]
        return self._members

    def native(self, layers: Sequence[PackedLinear]) -> NativeWeight | None:
        """Return it as the kernels read it, if it is the weight of just these layers."""
        found = self._multiplier if list(layers) == self._members else None
        return found if isinstance(found, NativeWeight) else None

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
        out = self._multiplier(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], self._num_outputs)


def get_native_weight(layers: Sequence[nn.Module]) -> NativeWeight | None:
    """Return the one weight of these layers as the kernels read it, if there is such a one."""
    packed = [layer for layer in layers if type(layer) is PackedLinear]
    return packed[0].native_weight(*packed[1:]) if len(packed) == len(layers) else None


def get_multiplier(
    weight_NK: Tensor, bias_N: Tensor | None, *, invariant: bool, int8: bool = False
) -> Multiplier:
    """Return the fastest way to multiply by a weight on this CPU; a plain one on a GPU.

    Args:
        weight_NK: In float32 or bfloat16.
        bias_N: Added to every row; in the same dtype.
        invariant: Whether a row's result may not depend on the rows beside it.
        int8: Whether to keep the weight in 8 bits, with a scale for each output.
    """
    num_outputs, num_inputs = weight_NK.shape
    native = load_native() if weight_NK.device.type == "cpu" else None
    if native is not None and not native.multiplies(weight_NK.dtype):
        native = None
    if native is not None and weight_NK.dtype == torch.bfloat16 and num_inputs % 2:
        native = None
    weight = partial(NativeWeight, bias=bias_N, num_inputs=num_inputs, num_outputs=num_outputs)
    if int8:
        levels_NK, scales_N = quantize(weight_NK)
        if native is not None and weight_NK.dtype == torch.bfloat16:
            scales = F.pad(scales_N, (0, -num_outputs % PANEL))
            return weight(native=native, packed=native.pack(levels_NK), scales=scales)
        multiply: Multiplier = partial(_multiply_levels, levels_NK, scales_N, bias_N)
    elif native is not None:
        return weight(native=native, packed=native.pack(weight_NK))
    elif weight_NK.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK, _TYPICAL_ROWS)
        multiply = partial(_multiply_by_onednn, packed, bias_N)
    else:
        multiply = partial(F.linear, weight=weight_NK, bias=bias_N)
    return partial(_multiply_in_tiles, multiply) if invariant else multiply


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight's levels, int8 [N, K] from -127 to 127, and its scales, float32 [N]."""
    weight_NK = weight_NK.float()
    scales_N = weight_NK.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight_NK / scales_N[:, None]).round().to(torch.int8), scales_N


def _multiply_levels(
    levels_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None, x_MK: Tensor
) -> Tensor:
    y_MN = F.linear(x_MK, levels_NK.to(x_MK.dtype)) * scales_N
    return (y_MN if bias_N is None else y_MN + bias_N).to(x_MK.dtype)


def _multiply_by_onednn(packed: Tensor, bias_N: Tensor | None, x_MK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_MK, packed, bias_N, "none", [], "")


def _multiply_in_tiles(multiply: Multiplier, x_MK: Tensor) -> Tensor:
    """Multiply always as many rows at once: torch chooses its order of sums by their number."""
    num_rows = x_MK.shape[0]
    padded = F.pad(x_MK, (0, 0, 0, -num_rows % _TILE_ROWS))
    return torch.cat([multiply(tile) for tile in padded.split(_TILE_ROWS)])[:num_rows]


def pack_linears(model: nn.Module, *, invariant: bool = False, int8: bool = False) -> None:
    """Pack the model's linear layers for this CPU; on a GPU only into 8 bits.

    Weights are laid out once, not at every call. An embedding tied to a layer keeps its own copy.

    Args:
        model: Its layers are replaced.
        invariant: Whether a row's result may not depend on the rows beside it.
        int8: Whether weights are kept in 8 bits; those of the output layer are not.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for names in list(_groups(model, int8=int8)):
        linears = [model.get_submodule(name) for name in names]
        packed = _Packed(linears, invariant=invariant, int8=int8 and head not in linears)
        for name, layer in zip(names, packed.layers(linears), strict=True):
            model.set_submodule(name, layer)


def _groups(model: nn.Module, *, int8: bool) -> Iterator[list[str]]:
    """Name the layers to pack, siblings together."""
    for prefix, module in model.named_modules():
        children = [name for name, child in module.named_children() if _fits(child, int8=int8)]
        for siblings in _SIBLINGS:
            if set(siblings) <= set(children):
                children = [name for name in children if name not in siblings]
                yield [_path(prefix, name) for name in siblings]
        for name in children:
            yield [_path(prefix, name)]


def _fits(module: nn.Module, *, int8: bool) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and (int8 or module.weight.device.type == "cpu")
    )


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _bias_of(linear: nn.Linear) -> Tensor:
    if linear.bias is not None:
        return linear.bias.detach()
    return linear.weight.new_zeros(linear.out_features)
