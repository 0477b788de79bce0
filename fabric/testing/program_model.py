"""A transformers model whose points are visited during its forward pass, by PyTorch hooks.

Part of the oracle of programs: eager attention written out, one request at a time, no batch.

Shapes: T positions of the step, S keys, H heads, K key-value heads, D head size, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

from fabric.messages.program import LowRank, Normalized, Overlay, Rows, Scaled

ATTENTION = "fabric_oracle"


class Visitor(Protocol):
    """What is called at every point of a step, in the order of the forward pass."""

    def __call__(self, point: str, h: Tensor, *, held: Tensor | None = None) -> Tensor:
        """Return what goes on from the point.

        Args:
            point: Its canonical name.
            h: What came there, [T, ...].
            held: What others hold, and ``h`` is a view of: it is itself to be changed.
        """


class StopHere(Exception):
    """The stack was left before its end, as asked."""


@dataclass(slots=True)
class Visited:
    """A model and its points.

    Args:
        model: In float32 and ``eval``; its attention is replaced by a written-out one.
    """

    model: PreTrainedModel
    _visitor: Visitor | None = None
    _cache: DynamicCache | None = None
    _patched: bool = False
    _names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        self.model.eval().set_attn_implementation(ATTENTION)

    @property
    def layers(self) -> nn.ModuleList:
        """The stack."""
        base = self.model.base_model
        found = base.h if hasattr(base, "h") else base.layers
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the stack."""
        base = self.model.base_model
        return _first(base, "norm", "ln_f")

    def norm(self, site: str) -> nn.Module:
        """Return the norm at ``final.norm`` or ``layers.i.{attn,mlp}.norm``."""
        if site == "final.norm":
            return self.final_norm
        _, layer, part, _ = site.split(".")
        return _norms(self.layers[int(layer)])[part]

    def unembed(self, x: Tensor) -> Tensor:
        """Return logits of normed hidden states, capped as the model caps them."""
        logits: Tensor = _plain(self.model.get_output_embeddings())(x)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embedding's rows as they enter."""
        rows: Tensor = _plain(self.model.get_input_embeddings())(ids)
        return rows

    def forward(self, ids: list[int], cache: DynamicCache, visitor: Visitor) -> Tensor:
        """Run one step of one request, and return its logits [T, vocabulary].

        Raises:
            StopHere: The visitor left the stack.
        """
        self._visitor, self._cache = visitor, cache
        token = _VISITED.set(self)
        hooks = self._hooked()
        try:
            made = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
            _VISITED.reset(token)
            self._visitor = None
        logits: Tensor = made.logits[0]
        return visitor("logits", logits)

    def layer_alone(self, layer: int, x: Tensor) -> Tensor:
        """Return what one layer makes of hidden states [positions, M], at positions from 0 on."""
        outer, self._visitor = self._visitor, None
        made: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> object:
            return (x[None], *args[1:]), kwargs

        def leave(_: nn.Module, __: object, output: object) -> None:
            made.append((output[0] if isinstance(output, tuple) else output)[0])  # type: ignore[index]
            raise StopHere

        module = self.layers[layer]
        hooks = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
        try:
            self.model(torch.zeros(1, x.shape[0], dtype=torch.long), use_cache=False)
        except StopHere:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            self._visitor = outer
        return made[0]

    def matmul(self, name: str, x: Tensor) -> Tensor:
        """Return what one matmul, named by its module or its weight, makes of x."""
        module = self.model.get_submodule(name.removesuffix(".weight"))
        made: Tensor = _plain(module)(x)
        return made

    @contextmanager
    def overlaid(
        self, overlays: tuple[Overlay, ...], constants: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Replace weights by patched copies of them, for as long as this lasts."""
        before: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters())
        try:
            for overlay in overlays:
                weight = parameters[overlay.weight]
                before.setdefault(overlay.weight, weight.data)
                turn = self._is_transposed(overlay.weight)
                own = weight.data.T if turn else weight.data
                patched = _patched(own, overlay, constants)
                weight.data = (patched.T if turn else patched).contiguous()
            yield
        finally:
            for name, data in before.items():
                parameters[name].data = data

    def _is_transposed(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)

    def _visit(self, point: str, h: Tensor, *, in_place: bool = False) -> Tensor:
        """Visit what has a batch axis of one."""
        if self._visitor is None:
            return h
        changed = self._visitor(point, h[0], held=h if in_place else None)
        return h if in_place else changed[None]

    def _hooked(self) -> list[torch.utils.hooks.RemovableHandle]:
        model = self.model
        hooks = [
            _on_output(model.get_input_embeddings(), self._point("embed.out")),
            _on_output(self.final_norm, self._point("final.norm.out")),
            self.final_norm.register_forward_pre_hook(lambda *_: self._arrive(len(self.layers))),
        ]
        for i, layer in enumerate(self.layers):
            hooks += self._hooked_layer(f"layers.{i}", i, layer)
        return hooks

    def _arrive(self, layer: int) -> None:
        if self._visitor is not None:
            self._visitor(f"before.{layer}", torch.empty(0))

    def _point(self, point: str, heads: int = 0) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:
            if not heads:
                return self._visit(point, x)
            divided = x.unflatten(-1, (heads, -1))
            return self._visit(point, divided).flatten(-2)

        return visit

    def _hooked_layer(
        self, at: str, i: int, layer: nn.Module
    ) -> list[torch.utils.hooks.RemovableHandle]:
        attention, mlp = _first(layer, "self_attn", "attn"), _first(layer, "mlp")
        config = self.model.config
        num_heads = config.num_attention_heads
        num_kv = getattr(config, "num_key_value_heads", None) or num_heads

        def enter(x: Tensor) -> Tensor:
            self._arrive(i)
            return self._visit(f"{at}.in", self._replaced(i, x))

        hooks = [
            _on_input(layer, enter),
            _on_input(attention, self._point(f"{at}.attn.in")),
            _on_output(attention, self._point(f"{at}.attn.out")),
            _on_input(_norms(layer)["mlp"], lambda x: self._visit(f"{at}.mid", x, in_place=True)),
            _on_input(mlp, self._point(f"{at}.mlp.in")),
            _on_output(mlp, self._point(f"{at}.mlp.out")),
            _on_output(layer, self._point(f"{at}.out")),
        ]
        if hasattr(attention, "c_attn"):
            hooks.append(_on_output(attention.c_attn, self._fused(at, num_heads)))
        else:
            for name, heads in (("q", num_heads), ("k", num_kv), ("v", num_kv)):
                module = getattr(attention, f"{name}_proj")
                hooks.append(_on_output(module, self._point(f"{at}.attn.{name}", heads)))
        output = _first(attention, "o_proj", "c_proj")
        hooks.append(_on_input(output, self._point(f"{at}.attn.z", num_heads)))
        hooks.append(output.register_forward_hook(self._heads_out(at, num_heads)))
        for name, module in _parts_of_mlp(mlp).items():
            on = _on_input if name == "act" else _on_output
            hooks.append(on(module, self._point(f"{at}.mlp.{name}")))
        if hasattr(mlp, "experts"):
            hooks.append(mlp.gate.register_forward_hook(self._router(at)))
        return hooks

    def _replaced(self, layer: int, x: Tensor) -> Tensor:
        """Let a run that starts at this layer put its own hidden states in."""
        return self._visit(f"start.{layer}", x)

    def _fused(self, at: str, heads: int) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:
            parts = zip("qkv", x.chunk(3, dim=-1), strict=True)
            return torch.cat([self._point(f"{at}.attn.{p}", heads)(y) for p, y in parts], -1)

        return visit

    def _heads_out(self, at: str, heads: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor | None:
            if self._visitor is None:
                return None
            z_THD = args[0][0].unflatten(-1, (heads, -1))
            weight = module.weight if isinstance(module, Conv1D) else module.weight.T
            assert isinstance(weight, Tensor)
            w_HDM = weight.unflatten(0, (heads, -1))
            each_THM = torch.einsum("thd,hdm->thm", z_THD, w_HDM)
            kept = self._visitor(f"{at}.attn.head_out", each_THM)
            if kept is each_THM:
                return None
            bias = module.bias if isinstance(module.bias, Tensor) else 0
            return (kept.sum(1) + bias)[None]

        return hook

    def _router(self, at: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if self._visitor is not None:
                self._visitor(f"{at}.moe.router", output[0])
                self._visitor(f"{at}.moe.experts", output[2])

        return hook

    def attend(self, layer: int, q_HTD: Tensor, k_KSD: Tensor) -> tuple[Tensor, Tensor]:
        """Visit the queries and the step's own keys, and return all of both."""
        if self._visitor is None or not hasattr(self.model.base_model, "rotary_emb"):
            return q_HTD, k_KSD
        at, num = f"layers.{layer}.attn", q_HTD.shape[1]
        q_THD = self._visitor(f"{at}.q_rope", q_HTD.transpose(0, 1))
        old_KSD, new_KTD = k_KSD[:, :-num], k_KSD[:, -num:]
        new_TKD = new_KTD.transpose(0, 1)
        kept_TKD = self._visitor(f"{at}.k_rope", new_TKD)
        if kept_TKD is not new_TKD:
            k_KSD = torch.cat([old_KSD, kept_TKD.transpose(0, 1)], 1)
            assert self._cache is not None
            self._cache.layers[layer].keys = k_KSD[None]
        return q_THD.transpose(0, 1), k_KSD

    def visit_THS(self, point: str, x_HTS: Tensor) -> Tensor:
        """Visit scores or a pattern, which have their heads first here."""
        if self._visitor is None:
            return x_HTS
        return self._visitor(point, x_HTS.transpose(0, 1)).transpose(0, 1)


_VISITED: ContextVar[Visited | None] = ContextVar("visited", default=None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention written out; query [1, H, T, D], key and value [1, K, S, D]."""
    visited, layer = _VISITED.get(), module.layer_idx
    q_HTD, k_KSD, v_KSD = query[0], key[0], value[0]
    assert isinstance(layer, int)
    if visited is not None:
        q_HTD, k_KSD = visited.attend(layer, q_HTD, k_KSD)
    shared = q_HTD.shape[0] // k_KSD.shape[0]
    k_HSD, v_HSD = (x.repeat_interleave(shared, 0) for x in (k_KSD, v_KSD))
    scale = q_HTD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_HTS = torch.einsum("htd,hsd->hts", q_HTD, k_HSD) * scale
    if softcap is not None:
        scores_HTS = torch.tanh(scores_HTS / softcap) * softcap
    hidden_TS = torch.zeros(scores_HTS.shape[1:], dtype=torch.bool)
    if attention_mask is not None:
        hidden_TS = attention_mask[0, 0, :, : scores_HTS.shape[-1]] < 0
    scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    if visited is not None:
        scores_HTS = visited.visit_THS(f"layers.{layer}.attn.scores", scores_HTS)
        scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    pattern_HTS = scores_HTS.softmax(-1)
    if visited is not None:
        pattern_HTS = visited.visit_THS(f"layers.{layer}.attn.pattern", pattern_HTS)
    z_THD = torch.einsum("hts,hsd->thd", pattern_HTS, v_HSD)
    return z_THD[None], None


def _patched(weight: Tensor, overlay: Overlay, constants: Mapping[str, Tensor]) -> Tensor:
    """Return a copy of a weight [out, in] under an overlay."""
    match overlay:
        case LowRank():
            u, v = constants[overlay.u].float(), constants[overlay.v].float()
            return weight + overlay.alpha * (u @ v.T)
        case Scaled():
            return weight * overlay.k
        case Rows():
            copy = weight.clone()
            copy[list(overlay.index)] = constants[overlay.x].to(weight.dtype)
            return copy
        case Normalized():
            length = weight.square().sum(overlay.axis, keepdim=True).sqrt()
            return weight / length.clamp_min(1e-12)


def _on_input(
    module: nn.Module, visit: Callable[[Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    def hook(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if args:
            return (visit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(
    module: nn.Module, visit: Callable[[Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (visit(output[0]), *output[1:])
        return visit(output)

    return module.register_forward_hook(hook)


def _norms(layer: nn.Module) -> dict[str, nn.Module]:
    return {
        "attn": _first(layer, "input_layernorm", "ln_1"),
        "mlp": _first(layer, "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    }


def _parts_of_mlp(mlp: nn.Module) -> dict[str, nn.Module]:
    names = {"gate": "gate_proj", "up": "up_proj", "act": "down_proj"}
    if hasattr(mlp, "c_fc"):
        names = {"up": "c_fc", "act": "c_proj"}
    return {point: getattr(mlp, name) for point, name in names.items() if hasattr(mlp, name)}


def _first(parent: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if isinstance(module := getattr(parent, name, None), nn.Module):
            return module
    raise AttributeError(f"{type(parent).__name__} has none of {names}")


def _plain(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a module's own computation, past the hooks that are on it."""
    plain: Callable[[Tensor], Tensor] = module.forward
    return plain
