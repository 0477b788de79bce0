"""Parameters are counted exactly: by hand, as published, and as transformers builds them."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.errors import ShapeInvalid, UnknownShape
from fabric.planning import KNOWN_MODELS, known_shape, shape_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 250,
    "max_position_embeddings": 64,
}


def by_hand(hidden: int, layers: int, kv: int, width: int, vocabulary: int, tied: bool) -> int:
    """Llama: q and o are square, k and v are narrower, three matrices of the MLP, two norms."""
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width + 2 * hidden
    return layers * layer + vocabulary * hidden * (1 if tied else 2) + hidden


@pytest.mark.parametrize(
    ("name", "counted", "published"),
    [
        ("SmolLM2-135M", by_hand(576, 30, 192, 1536, 49152, tied=True), 134_515_008),
        ("Llama-3-8B", by_hand(4096, 32, 1024, 14336, 128256, tied=False), 8_030_261_248),
        ("Llama-3-70B", by_hand(8192, 80, 1024, 28672, 128256, tied=False), 70_553_706_496),
    ],
)
def test_llama_is_counted_as_by_hand_and_as_published(
    name: str, counted: int, published: int
) -> None:
    assert known_shape(name).parameters == counted == published


def test_mixtral_is_counted_as_by_hand_and_as_published() -> None:
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert, router, norms = 3 * 4096 * 14336, 8 * 4096, 2 * 4096
    ends = 2 * 32000 * 4096 + 4096
    shape = known_shape("Mixtral-8x7B")
    assert shape.parameters == 32 * (attention + 8 * expert + router + norms) + ends
    assert shape.parameters == 46_702_792_704
    assert shape.active_parameters == 32 * (attention + 2 * expert + router + norms) + ends


def test_a_model_of_a_million_million_parameters_is_counted_as_by_hand() -> None:
    query = 7168 * 1536 + 1536 + 1536 * 64 * (128 + 64)
    key_value = 7168 * (512 + 64) + 512 + 512 * 64 * (128 + 128)
    attention = query + key_value + 64 * 128 * 7168
    norms = 2 * 7168
    dense = attention + norms + 3 * 7168 * 18432
    expert = 3 * 7168 * 2048
    routed = attention + norms + 384 * 7168 + (384 + 1) * expert
    ends = 2 * 163840 * 7168 + 7168
    shape = known_shape("Kimi-K2")
    assert shape.parameters == dense + 60 * routed + ends
    assert 1e12 < shape.parameters < 1.03e12
    assert shape.active_parameters == shape.parameters - 60 * (384 - 8) * expert


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("GPT-2", 124_439_808),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-405B", 405_853_388_800),
        ("Mistral-7B", 7_241_732_096),
        ("Mixtral-8x22B", 140_630_071_296),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Gemma-2-9B", 9_241_705_984),
        ("Gemma-3-270M", 268_098_176),
        # Published with 256 correction biases in each of 58 layers, which no token multiplies.
        ("DeepSeek-V3", 671_026_419_200 - 58 * 256),
    ],
)
def test_well_known_models_have_their_published_size(name: str, published: int) -> None:
    assert known_shape(name).parameters == published


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", " SmolLM2-135M "]
)
def test_a_tuned_model_has_the_shape_it_was_tuned_from(name: str) -> None:
    assert known_shape(name).name == "SmolLM2-135M"


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownShape, match=r"did you mean Llama-3-70B\?") as caught:
        known_shape("Lama-3-70B")
    assert caught.value.detail["known"] == list(KNOWN_MODELS)
    with pytest.raises(UnknownShape) as caught:
        known_shape("completely different")
    assert caught.value.detail["nearest"] == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "96"}, "not a whole number"),
        ({"hidden_size": 96.5}, "not a whole number"),
        ({"hidden_size": float("nan")}, "not a whole number"),
        ({"hidden_size": True}, "not a whole number"),
        ({"vocab_size": -1}, "must be from 1"),
        ({"vocab_size": 10**12}, "must be from 1"),
        ({"num_hidden_layers": 10**8}, "from 1 to 1000"),
        ({"num_key_value_heads": 4}, "cannot share"),
        ({"tie_word_embeddings": "yes"}, "not true or false"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "3 experts"),
        (
            {
                "model_type": "qwen3_moe",
                "moe_intermediate_size": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_only_layers": "none",
            },
            "not a list",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_value(
    changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ShapeInvalid, match=reason):
        shape_of("mine", {**LLAMA, **changes})


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 6,
}
GPT2 = {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 250, "n_positions": 64}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 20},
        {"model_type": "mistral", "head_dim": 20},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "phi3", "pad_token_id": 0},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "head_dim": 20, "attention_bias": True},
        {"model_type": "qwen3_moe", "num_experts": 4, "head_dim": 20, **MOE},
        {
            **{"model_type": "qwen3_moe", "num_experts": 4, **MOE},
            **{"decoder_sparse_step": 2, "mlp_only_layers": [1]},
        },
        {"model_type": "gemma", "head_dim": 20},
        {"model_type": "gemma2"},
        {"model_type": "gemma3_text", "head_dim": 20},
        {"model_type": "gpt2", **GPT2},
        {"model_type": "gpt2", **GPT2, "n_inner": 100},
        {"model_type": "deepseek_v3", **LATENT},
        {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": None, "attention_bias": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:40] or "llama",
)
def test_every_family_is_counted_as_transformers_builds_it(changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**LLAMA, **changes}
    if config["model_type"] == "gpt2":
        config = changes
    built = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    model.tie_weights()
    expected = sum({id(p): p.numel() for p in model.parameters()}.values())
    assert shape_of("mine", config).parameters == expected
    assert shape_of("saved", built.to_diff_dict()).parameters == expected
