"""Tiny models with random weights, one of each family whose blocks differ. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 258,
}
SMALL_WINDOW: dict[str, Any] = {"head_dim": 16, "sliding_window": 20}
LLAMA3: dict[str, object] = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, scaled rotation": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    ),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3, norms of heads": lambda: Qwen3ForCausalLM(
        Qwen3Config(**(SIZES | {"num_key_value_heads": 1}), head_dim=16)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=3, n_positions=256,
                   initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    ),
    "gemma2, capped scores and windows": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **SMALL_WINDOW, attn_logit_softcapping=2.0,
                     final_logit_softcapping=5.0)
    ),
    "gemma3, windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**(SIZES | {"num_hidden_layers": 6}), **SMALL_WINDOW,
                         layer_types=["sliding_attention", "full_attention"] * 3)
    ),
    "mistral, a window shorter than the context": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=20)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=32, decoder_sparse_step=1)
    ),
}  # fmt: skip
"""Each call makes one; seed torch before it."""
