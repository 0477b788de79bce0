"""The parts of a loaded model, found by the names that transformers' families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

_LAYERS = ("layers", "h")
_ATTENTION = ("self_attn", "attn")
_ATTENTION_NORM = ("input_layernorm", "ln_1")
_MLP = ("mlp", "block_sparse_moe")
_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
_OUTPUT = ("o_proj", "c_proj", "dense")
_DOWN = ("down_proj", "c_proj", "fc2")
_UP = ("up_proj", "c_fc", "fc1")
_FINAL_NORM = ("norm", "ln_f", "final_layernorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """One layer's modules; ``None`` for those it does not have under a name that is known.

    ``fused`` projects queries, keys and values in one (GPT-2); else ``q``, ``k`` and ``v`` do.
    """

    layer: nn.Module
    attention: nn.Module
    attention_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp: nn.Module | None
    q: nn.Module | None
    k: nn.Module | None
    v: nn.Module | None
    fused: nn.Module | None
    output: nn.Module | None
    gate: nn.Module | None
    up: nn.Module | None
    down: nn.Module | None
    router: nn.Module | None
    experts: nn.Module | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """A model's modules, by what they are for."""

    embedding: nn.Module
    layers: tuple[LayerParts, ...]
    final_norm: nn.Module | None
    head: nn.Module

    @staticmethod
    def of(model: PreTrainedModel) -> Anatomy | None:
        """Return the model's parts; ``None`` where its layers are not found."""
        base = model.base_model
        layers = _child(base, _LAYERS)
        if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.num_hidden_layers:
            return None
        parts = [_layer_parts(layer) for layer in layers]
        found = [part for part in parts if part is not None]
        if len(found) != len(parts):
            return None
        return Anatomy(
            embedding=model.get_input_embeddings(),
            layers=tuple(found),
            final_norm=_child(base, _FINAL_NORM),
            head=model.get_output_embeddings(),
        )


def _layer_parts(layer: nn.Module) -> LayerParts | None:
    attention = _child(layer, _ATTENTION)
    if attention is None:
        return None
    mlp = _child(layer, _MLP)
    inner = mlp if mlp is not None else nn.Module()
    experts = _child(inner, ("experts",))
    return LayerParts(
        layer=layer,
        attention=attention,
        attention_norm=_child(layer, _ATTENTION_NORM),
        mlp_norm=_child(layer, _MLP_NORM),
        mlp=mlp,
        q=_child(attention, ("q_proj",)),
        k=_child(attention, ("k_proj",)),
        v=_child(attention, ("v_proj",)),
        fused=_child(attention, ("c_attn",)),
        output=_child(attention, _OUTPUT),
        gate=None if experts is not None else _child(inner, ("gate_proj",)),
        up=None if experts is not None else _child(inner, _UP),
        down=None if experts is not None else _child(inner, _DOWN),
        router=None if experts is None else _child(inner, ("gate", "router")),
        experts=experts,
    )


def _child(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    children = dict(parent.named_children())
    return next((children[name] for name in names if name in children), None)
