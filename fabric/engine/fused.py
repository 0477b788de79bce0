"""Norms and rotary positions in one pass each, where a model computes them as Llama does.

Which modules do is decided by their source: transformers copies the same few lines into every
family that uses them. Modules with other lines stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from fabric.engine.native import Native, load_native

_ROTATE = "apply_rotary_pos_emb"
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


def fuse(model: PreTrainedModel) -> None:
    """Let the model's norms and rotary positions run in one pass, if the kernels are there."""
    native = load_native()
    if native is None or model.device.type != "cpu":
        return
    for name, module in list(model.named_modules()):
        if _same_source(
            getattr(type(module), "forward", None), modeling_llama.LlamaRMSNorm.forward
        ):
            if native.takes(module.weight):
                model.set_submodule(name, RmsNorm(module, native))
        elif _same_source(_rotation_of(module), _llama_rotate):
            setattr(sys.modules[type(module).__module__], _ROTATE, _rotate)


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
