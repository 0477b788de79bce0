"""Runs a few tokens to see whether a model's parts do what their names say.

Shapes: N tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fabric.engine.attention import Chunk, Scoring, attend_causally
from fabric.engine.programs.anatomy import Anatomy, LayerParts
from fabric.engine.programs.routing import Route, route_of
from fabric.engine.runner import run_ragged

_NUM_TOKENS = 5
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Of the distance of sums to what they should be, relative to their norm."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one layer's attention: query heads, key-value heads, their sizes."""

    num: int
    num_kv: int
    size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass over a few tokens showed."""

    heads: dict[int, Heads]
    widths: dict[nn.Module, int]
    """Features of the points inside an MLP: inputs of down projections, outputs of the others."""
    routes: dict[nn.Module, Route]
    """Of routers, where they are known."""
    middle_reasons: dict[int, str]
    """Layers whose residual stream cannot be met in their middle, and why."""
    tuples: frozenset[nn.Module]
    """Modules that give a tuple, their tensor first."""


class Watch:
    """Runs a few tokens, moves every layer's middle a little, and sees what adds up."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._model = model
        self._anatomy = anatomy
        self._heads: dict[int, Heads] = {}
        self._routes: dict[nn.Module, Route] = {}
        self._tuples: set[nn.Module] = set()
        self._kept: dict[tuple[nn.Module, str], Tensor] = {}

    def run(self) -> Seen:
        """Run the tokens and return what was seen."""
        hooks = []
        for parts in self._anatomy.layers:
            if parts.mlp_norm is not None:
                hooks.append(parts.mlp_norm.register_forward_pre_hook(self._move, with_kwargs=True))
            for module in (parts.layer, parts.mlp, parts.attention, *_inside(parts), *_post(parts)):
                if module is not None:
                    hooks.append(module.register_forward_pre_hook(self._keep_in, with_kwargs=True))
                    hooks.append(module.register_forward_hook(self._keep_out))
        tokens = list(range(_NUM_TOKENS))
        chunk = Chunk(tokens=tokens, start=0, blocks=(), num_wanted=1)
        try:
            run_ragged(self._model, [chunk], self._attend)
        finally:
            for hook in hooks:
                hook.remove()
        widths = {
            module: self._kept[module, "in" if module is parts.down else "out"].shape[-1]
            for parts in self._anatomy.layers
            for module in _inside(parts)
            if (module, "out") in self._kept
        }
        reasons = {
            index: reason
            for index, parts in enumerate(self._anatomy.layers)
            if (reason := self._middle_reason(parts))
        }
        return Seen(self._heads, widths, self._routes, reasons, frozenset(self._tuples))

    def _attend(
        self,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        scale: float | None,
        options: Mapping[str, object],
    ) -> Tensor:
        self._heads[layer] = Heads(q_NHD.shape[1], k_NKD.shape[1], k_NKD.shape[2], v_NKD.shape[2])
        return attend_causally(q_NHD, k_NKD, v_NKD, Scoring.of(scale, options, q_NHD.shape[2]))

    def _move(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = given(args, kwargs)
        self._kept[module, "before"] = x.clone()
        x += 0.5 * x.flip(-1)
        self._kept[module, "moved"] = x.clone()

    def _keep_in(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self._kept[module, "in"] = given(args, kwargs).clone()

    def _keep_out(self, module: nn.Module, _: object, output: object) -> None:
        x = output[0] if isinstance(output, tuple) else output
        assert isinstance(x, Tensor)
        self._kept[module, "out"] = x.clone()
        if isinstance(output, tuple):
            self._tuples.add(module)
        if isinstance(output, tuple) and len(output) == 3:
            route = route_of(*output)
            self._routes |= {} if route is None else {module: route}

    def _middle_reason(self, parts: LayerParts) -> str:
        norm = parts.mlp_norm
        if norm is None or (norm, "moved") not in self._kept or parts.mlp is None:
            return "its layers have no norm between attention and MLP that takes the residual"
        after_attention, after_mlp = _post(parts)
        of_attention = self._kept[after_attention or parts.attention, "out"]
        of_mlp = self._kept[after_mlp or parts.mlp, "out"]
        before, moved = self._kept[norm, "before"], self._kept[norm, "moved"]
        sums = [
            (self._kept[parts.layer, "in"] + of_attention, before),
            (moved + of_mlp, self._kept[parts.layer, "out"]),
        ]
        for total, expected in sums:
            distance = float((total.float() - expected.float()).norm() / expected.float().norm())
            if not distance <= _TOLERANCE[self._model.dtype]:
                return "its attention and its MLP do not add to the residual one after the other"
        return ""


def given(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
    """Return the tensor that a module is called with, by position or as ``hidden_states``."""
    x = args[0] if args else kwargs["hidden_states"]
    assert isinstance(x, Tensor)
    return x


def _inside(parts: LayerParts) -> list[nn.Module]:
    found = (parts.gate, parts.up, parts.down, parts.router)
    return [module for module in found if module is not None]


def _post(parts: LayerParts) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the norms that Gemma puts after attention and after the MLP."""
    children = dict(parts.layer.named_children())
    if "pre_feedforward_layernorm" not in children:
        return None, None
    return children.get("post_attention_layernorm"), children.get("post_feedforward_layernorm")
