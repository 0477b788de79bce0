"""Norms, rotary positions and activations in one pass each, row by row.

Which modules compute what Llama's do is decided by their source: transformers copies the same few
lines into every family that uses them. Modules with other lines stay as they are. torch's own
functions of single numbers may round the last ones of a tensor differently; these never do, so that
a row's bits do not depend on those beside it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from fabric.engine.native import Native, load_native

_ROTATE = "apply_rotary_pos_emb"

_PAGE = 256
"""Positions whose rotations are computed together."""

_GATES = {
    "SiLU": (1.0, 0.0),
    "SiLUActivation": (1.0, 0.0),
    "GELUTanh": (2 * (2 / math.pi) ** 0.5, 2 * (2 / math.pi) ** 0.5 * 0.044715),
}
"""Activations by their modules' names: x times the logistic function of a x + b x³."""

_DTYPES = (torch.float32, torch.bfloat16)

_llama_rotate: Callable[..., tuple[Tensor, Tensor]] = modeling_llama.apply_rotary_pos_emb


class RmsNorm(nn.Module):  # type: ignore[misc]
    """Llama's norm in one pass; rounds where Llama's module rounds."""

    def __init__(self, norm: nn.Module, native: Native) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self._native = native

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., K] over its root mean square times the weight, in its dtype."""
        rows = x.reshape(-1, x.shape[-1])
        return self._native.rms_norm(rows, self.weight, self.variance_epsilon).view(x.shape)


class Gate(nn.Module):  # type: ignore[misc]
    """SiLU, or GELU by tanh: both are the input times a logistic function of it."""

    def __init__(self, native: Native, a: float, b: float) -> None:
        super().__init__()
        self._native, self.a, self.b = native, a, b

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of ``x`` [..., K], in its shape and dtype."""
        rows = x.reshape(-1, x.shape[-1])
        return self._native.gate(rows, self.a, self.b).view(x.shape)


class RotaryTable(nn.Module):  # type: ignore[misc]
    """Cosines and sines by position, computed once, always so many positions together.

    Args:
        rotary: The model's module; called with positions, and whatever else it takes.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, position_ids: Tensor, *more: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each [1, N, D] in the dtype of ``x``."""
        key = (x.dtype, *more, *named.items())
        num = int(position_ids.max()) + 1
        if key not in self._tables or len(self._tables[key][0]) < num:
            pages = [
                self.rotary(x, at[None], *more, **named)
                for at in torch.arange(_up(num), device=position_ids.device).split(_PAGE)
            ]
            cosines, sines = (torch.cat([page[i][0] for page in pages]) for i in range(2))
            self._tables[key] = cosines, sines
        cosines, sines = self._tables[key]
        return cosines[position_ids], sines[position_ids]


def _up(num: int) -> int:
    """Return the power of two of pages that holds so many positions."""
    return _PAGE << (-(-num // _PAGE) - 1).bit_length()


def fuse(model: PreTrainedModel) -> None:
    """Let norms, positions and activations run in one pass each, where the kernels are there: on a
    CPU."""
    if model.device.type != "cpu":
        return
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb") and not isinstance(module, RotaryTable):
            model.set_submodule(name, RotaryTable(module))
    native = load_native()
    if native is None:
        return
    for name, module in list(model.named_modules()):
        if _same_source(
            getattr(type(module), "forward", None), modeling_llama.LlamaRMSNorm.forward
        ):
            if native.takes(module.weight):
                model.set_submodule(name, RmsNorm(module, native))
        elif _same_source(_rotation_of(module), _llama_rotate):
            setattr(sys.modules[type(module).__module__], _ROTATE, _rotate)
        elif (gate := _GATES.get(type(module).__name__)) and model.dtype in _DTYPES:
            model.set_submodule(name, Gate(native, *gate))


def rotates_natively(module: nn.Module) -> bool:
    """Say whether a module turns its queries and keys by what ``fuse`` has put there."""
    return _rotation_of(module) is _rotate


def _rotation_of(module: nn.Module) -> object:
    return vars(sys.modules[type(module).__module__]).get(_ROTATE)


@functools.cache
def _same_source(one: object, other: object) -> bool:
    if one is None or one is _rotate:
        return False
    try:
        return inspect.getsource(one) == inspect.getsource(other)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return False


def _rotate(
    q_BHND: Tensor, k_BKND: Tensor, cos_BND: Tensor, sin_BND: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """What transformers' function of this name computes; the engine's ragged rows in one pass."""
    native = load_native()
    if (
        native is None
        or unsqueeze_dim != 1
        or q_BHND.shape[0] != 1
        or q_BHND.requires_grad
        or k_BKND.requires_grad
        or q_BHND.shape[-1] != cos_BND.shape[-1]
        or not q_BHND.dtype == k_BKND.dtype == cos_BND.dtype
        or not (native.takes(q_BHND) and native.takes(k_BKND) and cos_BND.is_contiguous())
        or not sin_BND.is_contiguous()
    ):
        return _llama_rotate(q_BHND, k_BKND, cos_BND, sin_BND, unsqueeze_dim=unsqueeze_dim)
    cos, sin = cos_BND[0], sin_BND[0]
    q, k = (native.rotate(x[0].transpose(0, 1), cos, sin) for x in (q_BHND, k_BKND))
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None]
