"""Linear layers with weights packed once for the CPU's matrix kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TYPICAL_ROWS = 32
"""The batch that oneDNN lays weights out for."""


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer over a packed weight; the plain weight is given up."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().contiguous(), _TYPICAL_ROWS
        )
        self._bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., in] times the weight, [..., out] in the same dtype."""
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out.view(*x.shape[:-1], out.shape[-1])


def pack_linears(model: nn.Module) -> None:
    """Pack the model's bfloat16 linear layers where oneDNN computes them natively.

    torch would otherwise pack each weight anew at every call. Embeddings tied to a layer stay.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            model.set_submodule(name, PackedLinear(module))
