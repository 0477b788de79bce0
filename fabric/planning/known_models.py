"""Configurations of well-known models: the numbers of their ``config.json``, as published."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.errors import UnknownShape
from fabric.planning.config_reader import Config
from fabric.planning.families import shape_of
from fabric.planning.model_shape import ModelShape
from fabric.planning.names import resolve

_LLAMA_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)


def _config(family: str, *numbers: int, **others: object) -> Config:
    return {"model_type": family, **dict(zip(_LLAMA_KEYS, numbers, strict=True)), **others}


def _latent(experts: int, heads: int, vocabulary: int, num_dense: int, context: int) -> Config:
    return _config(
        *("deepseek_v3", 7168, 61, heads, heads, 18432, vocabulary, context),
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=2048,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=num_dense,
    )


_TIED = {"tie_word_embeddings": True}
_CHOOSE_2_OF_8 = {"num_local_experts": 8, "num_experts_per_tok": 2}
_CHOOSE_8_OF_128 = {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}

# fmt: off
KNOWN_MODELS: Mapping[str, Config] = {
    # family, hidden, layers, heads, key-value heads, inner width, vocabulary, context
    "SmolLM2-135M": _config("llama", 576, 30, 9, 3, 1536, 49152, 8192, **_TIED),
    "SmolLM2-360M": _config("llama", 960, 32, 15, 5, 2560, 49152, 8192, **_TIED),
    "SmolLM2-1.7B": _config("llama", 2048, 24, 32, 32, 8192, 49152, 8192, **_TIED),
    "GPT-2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
              "vocab_size": 50257, "n_positions": 1024},
    "Llama-3.2-1B": _config("llama", 2048, 16, 32, 8, 8192, 128256, 131072, **_TIED),
    "Llama-3-8B": _config("llama", 4096, 32, 32, 8, 14336, 128256, 8192),
    "Llama-3-70B": _config("llama", 8192, 80, 64, 8, 28672, 128256, 8192),
    "Llama-3.1-8B": _config("llama", 4096, 32, 32, 8, 14336, 128256, 131072),
    "Llama-3.1-70B": _config("llama", 8192, 80, 64, 8, 28672, 128256, 131072),
    "Llama-3.1-405B": _config("llama", 16384, 126, 128, 8, 53248, 128256, 131072),
    "Mistral-7B": _config("mistral", 4096, 32, 32, 8, 14336, 32000, 32768),
    "Mixtral-8x7B": _config("mixtral", 4096, 32, 32, 8, 14336, 32000, 32768, **_CHOOSE_2_OF_8),
    "Mixtral-8x22B": _config("mixtral", 6144, 56, 48, 8, 16384, 32768, 65536, **_CHOOSE_2_OF_8),
    "Qwen2.5-7B": _config("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072),
    "Qwen2.5-72B": _config("qwen2", 8192, 80, 64, 8, 29568, 152064, 131072),
    "Qwen3-8B": _config("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960),
    "Qwen3-32B": _config("qwen3", 5120, 64, 64, 8, 25600, 151936, 40960),
    "Qwen3-30B-A3B": _config("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, 40960,
                             moe_intermediate_size=768, **_CHOOSE_8_OF_128),
    "Qwen3-235B-A22B": _config("qwen3_moe", 4096, 94, 64, 4, 12288, 151936, 40960,
                               moe_intermediate_size=1536, **_CHOOSE_8_OF_128),
    "Gemma-2-9B": _config("gemma2", 3584, 42, 16, 8, 14336, 256000, 8192),
    "Gemma-3-270M": _config("gemma3_text", 640, 18, 4, 1, 2048, 262144, 32768),
    "DeepSeek-V3": _latent(256, 128, 129280, 3, 163840),
    "Kimi-K2": _latent(384, 64, 163840, 1, 131072),
}
# fmt: on

_SUFFIXES = ("-instruct", "-chat", "-it", "-base", "-hf")


def known_shape(name: str) -> ModelShape:
    """Return the shape of a well-known model.

    An organisation before the name and ``-instruct`` or the like after it do not matter: tuning
    leaves the shape as it was.

    Raises:
        UnknownShape: No model is called that; says which are, and which is nearest.
    """
    base = name.rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        if base.lower().endswith(suffix):
            base = base[: -len(suffix)]
    names, nearest = resolve(base, {known: known for known in KNOWN_MODELS}, {})
    if names is None:
        raise UnknownShape(model=name, known=list(KNOWN_MODELS), nearest=nearest)
    return shape_of(names, KNOWN_MODELS[names])
