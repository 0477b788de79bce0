"""A manifest of points written by hand from a transformers model's configuration.

For checks and oracles without an engine; an engine finds its own in the loaded model.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from fabric.messages.points import Lane, PointManifest, PointSpec

Tail = tuple[Literal["S"] | int, ...]
_NO_ROTATION = "its positions are not rotary; it is the same as without _rope"
_FUSED = "its experts are fused: what is inside them is never written down"
_MADE_TOGETHER = "the choice of experts is made together with its logits"


def manifest_of(model: PreTrainedModel) -> PointManifest:
    """Return the points of a Llama-, GPT-2-, Gemma- or Mixtral-like model in float32."""
    config = model.config
    weights = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return PointManifest(
        model="tiny@main",
        digest="0" * 64,
        family=config.model_type,
        dtype="float32",
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        num_parameters=model.num_parameters(),
        points=_points(model),
        weights=weights,
    )


def _points(model: PreTrainedModel) -> tuple[PointSpec, ...]:
    config = model.config
    layers = tuple(range(config.num_hidden_layers))
    hidden: Tail = (config.hidden_size,)
    vocabulary: Tail = (config.vocab_size,)
    return (
        _point("embed.out", hidden),
        *(
            _point(f"layers.{{i}}.{name}", tail, layers=layers, lane=lane, reason=reason)
            for name, tail, lane, reason in _of_layer(model)
        ),
        _point("final.norm.out", hidden),
        _point("logits", vocabulary),
        _point("sample", (), dtype="int64"),
    )


def _of_layer(model: PreTrainedModel) -> list[tuple[str, Tail, Lane, str]]:
    config = model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    rotates = config.model_type != "gpt2"
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    no_rotation = "" if rotates else _NO_ROTATION
    fused = _FUSED if experts else ""
    no_gate = fused or ("" if rotates else "its MLP has none")
    found: list[tuple[str, Tail, Lane, str]] = [
        ("in", (hidden,), "boundary", ""),
        ("attn.in", (hidden,), "eager", ""),
        ("attn.q", (heads, size), "eager", ""),
        ("attn.k", (kv, size), "eager", ""),
        ("attn.v", (kv, size), "eager", ""),
        ("attn.q_rope", (heads, size), "eager", no_rotation),
        ("attn.k_rope", (kv, size), "eager", no_rotation),
        ("attn.scores", (heads, "S"), "recompute", ""),
        ("attn.pattern", (heads, "S"), "recompute", ""),
        ("attn.z", (heads, size), "eager", ""),
        ("attn.head_out", (heads, hidden), "recompute", ""),
        ("attn.out", (hidden,), "boundary", ""),
        ("mid", (hidden,), "boundary", ""),
        ("mlp.in", (hidden,), "eager", ""),
        ("mlp.gate", (inner,), "eager", no_gate),
        ("mlp.up", (inner,), "eager", fused),
        ("mlp.act", (inner,), "eager", fused),
        ("mlp.out", (hidden,), "boundary", ""),
        ("out", (hidden,), "boundary", ""),
    ]
    if experts:
        place = [name for name, *_ in found].index("mlp.gate")
        found[place:place] = [
            ("moe.router", (experts,), "eager", _MADE_TOGETHER),
            ("moe.experts", (config.num_experts_per_tok,), "eager", _MADE_TOGETHER),
        ]
    return found


def _point(
    pattern: str,
    tail: Tail,
    *,
    layers: tuple[int, ...] = (),
    lane: Lane = "boundary",
    reason: str = "",
    dtype: str = "float32",
) -> PointSpec:
    return PointSpec(
        pattern=pattern,
        layers=layers,
        shape=("T", *tail),
        dtype="int64" if pattern.endswith("moe.experts") else dtype,
        read=not reason or reason == _MADE_TOGETHER,
        write=not reason,
        lane=lane,
        reason=reason,
    )
