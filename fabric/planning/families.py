"""Counts the parameters of a model from its Hugging Face configuration.

Source: the modules under ``transformers/models/<family>/modeling_<family>.py``; the tests compare
every family with the modules themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.planning.config_reader import Config, Reader
from fabric.planning.model_shape import LayerShape, ModelShape

_MOST_LAYERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What is peculiar to a family, and what its configuration leaves unsaid."""

    is_tied: bool = False
    head_size: int | None = None
    qkv_bias: bool | None = None
    norms: int = 2
    has_head_norms: bool = False
    expert_width_key: str = ""


_LLAMA_LIKE: Mapping[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False),
    "mixtral": _Family(qkv_bias=False, expert_width_key="intermediate_size"),
    "phi3": _Family(qkv_bias=False),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_size=128, has_head_norms=True),
    "qwen3_moe": _Family(has_head_norms=True, expert_width_key="moe_intermediate_size"),
    "gemma": _Family(is_tied=True, head_size=256),
    "gemma2": _Family(is_tied=True, head_size=256, norms=4),
    "gemma3_text": _Family(is_tied=True, head_size=256, norms=4, has_head_norms=True),
}


FAMILIES = (*_LLAMA_LIKE, "gpt2", "deepseek_v3", "kimi_k2")
"""What can be counted, by transformers' ``model_type``."""


def shape_of(name: str, config: Config) -> ModelShape:
    """Return the shape that a configuration describes.

    Args:
        name: What the model is called.
        config: The content of its ``config.json``.

    Raises:
        ShapeInvalid: The family is not one that is counted, or a number is missing or wrong.
    """
    reader = Reader(name, config)
    family = config.get("model_type")
    if family == "gpt2":
        return _gpt2(reader)
    if family in ("deepseek_v3", "kimi_k2"):
        return _latent(reader, str(family))
    if not isinstance(family, str) or family not in _LLAMA_LIKE:
        counted = ", ".join(FAMILIES)
        raise reader.refuse(f"its model_type is {family!r}; counted are {counted}")
    return _llama_like(reader, family)


def _llama_like(reader: Reader, name: str) -> ModelShape:
    family = _LLAMA_LIKE[name]
    hidden = reader.number("hidden_size")
    heads = reader.number("num_attention_heads")
    kv_heads = reader.number("num_key_value_heads", heads)
    head = reader.number("head_dim", family.head_size or hidden // heads)
    if heads % kv_heads:
        raise reader.refuse(f"{heads} heads cannot share {kv_heads} key-value heads evenly")
    q, kv = heads * head, kv_heads * head
    bias = reader.flag("attention_bias", False) if family.qkv_bias is None else family.qkv_bias
    small = family.norms * hidden + (2 * head if family.has_head_norms else 0)
    if bias:
        small += q + 2 * kv + (hidden if family.qkv_bias is None else 0)
    attention = 2 * hidden * q + 2 * hidden * kv
    width = reader.number("intermediate_size")
    mlp_bias = 2 * width + hidden if reader.flag("mlp_bias", False) else 0
    dense = LayerShape(
        divided=attention + 3 * hidden * width,
        small=small + mlp_bias,
        cache_values=2 * kv,
        score_values=2 * q,
        width=max(2 * q + 2 * kv, 2 * width),
    )
    routed, expert_width = dense, 0
    step, skipped = 1, frozenset[int]()
    if family.expert_width_key:
        expert_width = reader.number(family.expert_width_key)
        num_experts = reader.number("num_local_experts", also="num_experts")
        chosen = _chosen(reader, num_experts)
        routed = LayerShape(
            divided=attention,
            small=small + num_experts * hidden,
            num_experts=num_experts,
            num_chosen=chosen,
            expert=3 * hidden * expert_width,
            cache_values=2 * kv,
            score_values=2 * q,
            width=max(2 * q + 2 * kv, 2 * chosen * expert_width),
        )
        step, skipped = reader.number("decoder_sparse_step", 1), reader.numbers("mlp_only_layers")
    num_layers = _num_layers(reader, "num_hidden_layers")
    layers = tuple(
        routed if index not in skipped and (index + 1) % step == 0 else dense
        for index in range(num_layers)
    )
    return ModelShape(
        name=reader.name,
        family=name,
        layers=layers,
        hidden=hidden,
        vocabulary=reader.number("vocab_size"),
        is_tied=reader.flag("tie_word_embeddings", family.is_tied),
        final_small=hidden,
        context_tokens=reader.number("max_position_embeddings"),
        divisors=(heads, kv_heads, *((width,) if dense in layers else ())),
        expert_width=expert_width,
        notes=_window_note(name),
    )


def _gpt2(reader: Reader) -> ModelShape:
    hidden, heads = reader.number("n_embd"), reader.number("n_head")
    width = reader.number("n_inner", 4 * hidden)
    context = reader.number("n_positions")
    layer = LayerShape(
        divided=4 * hidden * hidden + 2 * hidden * width,
        small=4 * hidden + 3 * hidden + hidden + width + hidden,
        cache_values=2 * hidden,
        score_values=2 * hidden,
        width=max(4 * hidden, width),
    )
    return ModelShape(
        name=reader.name,
        family="gpt2",
        layers=(layer,) * _num_layers(reader, "n_layer"),
        hidden=hidden,
        vocabulary=reader.number("vocab_size"),
        is_tied=reader.flag("tie_word_embeddings", True),
        positions=context * hidden,
        final_small=2 * hidden,
        context_tokens=context,
        divisors=(heads, width),
    )


def _latent(reader: Reader, family: str) -> ModelShape:
    """DeepSeek's attention keeps one latent vector of a token; all heads are computed from it."""
    hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    rank, rope = reader.number("kv_lora_rank"), reader.number("qk_rope_head_dim")
    plain, value = reader.number("qk_nope_head_dim"), reader.number("v_head_dim")
    query_rank = reader.number("q_lora_rank", 0, least=0)
    queries = heads * (plain + rope)
    divided = rank * heads * (plain + value) + heads * value * hidden
    whole, small = hidden * (rank + rope), 2 * hidden + rank
    if query_rank:
        divided += query_rank * queries
        whole += hidden * query_rank
        small += query_rank
    else:
        divided += hidden * queries
    if reader.flag("attention_bias", False):
        small += rank + rope + hidden + query_rank
    width, expert_width = reader.number("intermediate_size"), reader.number("moe_intermediate_size")
    num_experts = reader.number("n_routed_experts")
    num_shared = reader.number("n_shared_experts", 1, least=0)
    chosen = _chosen(reader, num_experts)
    scores, expanded = heads * (plain + rope + value), heads * (plain + rope + value)
    dense = LayerShape(
        divided=divided + 3 * hidden * width,
        whole=whole,
        small=small,
        cache_values=rank + rope,
        cache_divided=False,
        score_values=scores,
        width=max(2 * expanded, 2 * width),
    )
    routed = LayerShape(
        divided=divided + 3 * hidden * expert_width * num_shared,
        whole=whole,
        small=small + num_experts * hidden,
        num_experts=num_experts,
        num_chosen=chosen,
        expert=3 * hidden * expert_width,
        cache_values=rank + rope,
        cache_divided=False,
        score_values=scores,
        width=max(2 * expanded, 2 * (chosen + num_shared) * expert_width),
    )
    num_layers = _num_layers(reader, "num_hidden_layers")
    num_dense = min(num_layers, reader.number("first_k_dense_replace", 0, least=0))
    return ModelShape(
        name=reader.name,
        family=family,
        layers=(dense,) * num_dense + (routed,) * (num_layers - num_dense),
        hidden=hidden,
        vocabulary=reader.number("vocab_size"),
        is_tied=reader.flag("tie_word_embeddings", False),
        final_small=hidden,
        context_tokens=reader.number("max_position_embeddings"),
        divisors=(heads, *((width,) if num_dense else ()), *((expert_width,) * (num_shared > 0))),
        expert_width=expert_width,
        expanded_cache_values=expanded,
        notes=("layers for multi-token prediction are not counted",),
    )


def _chosen(reader: Reader, num_experts: int) -> int:
    chosen = reader.number("num_experts_per_tok")
    if chosen > num_experts:
        raise reader.refuse(f"a token uses {chosen} experts and there are {num_experts}")
    return chosen


def _num_layers(reader: Reader, key: str) -> int:
    num_layers = reader.number(key)
    if num_layers > _MOST_LAYERS:
        raise reader.refuse(f"{key!r} is {num_layers}, and must be from 1 to {_MOST_LAYERS}")
    return num_layers


def _window_note(family: str) -> tuple[str, ...]:
    if family not in ("gemma2", "gemma3_text"):
        return ()
    return ("layers that look back over a window are counted with the whole context",)
