"""Every family gives transformers' tokens: alone, and in a batch with long and short rows."""

from __future__ import annotations

import pytest
import torch
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
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fabric.engine.model import load_model
from fabric.engine.source import ModelSource

SIZES = {
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
SMALL_WINDOW = {"head_dim": 16, "sliding_window": 20}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES = {
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
PROMPTS = [
    [3],
    [(5 * i) % 250 for i in range(70)],
    [7, 8, 9] * 9,
    [(i * i) % 250 for i in range(33)],
]
NUM_NEW = 16


def generate(model, ids):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_alone_and_mixed(family, save_model, drive):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    driver = drive(save_model(model))
    expected = [generate(model, ids) for ids in PROMPTS]
    assert [
        driver.greedy(ids, NUM_NEW, ignore_eos=True).wait().ids() for ids in PROMPTS
    ] == expected
    heard = [driver.greedy(ids, NUM_NEW, ignore_eos=True) for ids in PROMPTS]
    assert [h.wait().ids() for h in heard] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_mean_of_the_last_hidden_states(family, save_model, drive):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    driver = drive(save_model(model))
    model.set_attn_implementation("eager")  # the others leave capped scores out
    for ids, heard in [(ids, driver.embed(ids)) for ids in PROMPTS]:
        with torch.inference_mode():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert heard.vector == pytest.approx(expected.tolist(), abs=1e-5)


LAYOUTS = {
    "tensor": {"tensor_parallel": 2},
    "stages": {"pipeline_parallel": 2},
    "both": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
DIVIDED = [(family, layout) for family in FAMILIES for layout in ("tensor", "stages")]
DIVIDED += [(family, "both") for family in ("llama", "gpt2", "gemma3, windows", "mixtral")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "layout"), DIVIDED)
def test_a_model_divided_among_processes_is_the_same_model(family, layout, save_model, drive):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    path = save_model(model)
    driver = drive(path, **LAYOUTS[layout])
    expected = [generate(model, ids) for ids in PROMPTS]
    heard = [driver.greedy(ids, NUM_NEW, ignore_eos=True) for ids in PROMPTS]
    assert [h.wait().ids() for h in heard] == expected
    assert driver.greedy(PROMPTS[1], NUM_NEW, ignore_eos=True).wait().ids() == expected[1]
    assert (
        driver.engine.info.digest
        == load_model(ModelSource.parse(str(path)), name="whole", dtype="float32").digest
    )
    ids = PROMPTS[3]
    scored = driver.ask(ids, max_tokens=0, prompt_logprobs=True).wait().scored.tokens
    model.set_attn_implementation("eager")  # the others leave capped scores out
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    for position, token in enumerate(scored[1:]):
        exact = float(logprobs[position, ids[position + 1]])
        assert token.logprob == pytest.approx(exact, abs=1e-4)
    vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert driver.embed(ids).vector == pytest.approx(vector.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", None), ("llama", "both"), ("qwen2, biases", None), ("qwen2, biases", "tensor"),
     ("mixtral", None)],
)  # fmt: skip
def test_packed_weights_and_fused_kernels_change_no_more_than_rounding(
    family, layout, save_model, drive
):
    torch.manual_seed(3)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    path = save_model(model.bfloat16().eval())
    ids = PROMPTS[1]
    with torch.inference_mode():
        exact = model.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    driver = drive(path, dtype="bfloat16", **LAYOUTS.get(layout, {}))
    token = driver.ask(ids, max_tokens=1, logprobs=20).wait().tokens()[0]
    for top in token.top_logprobs:
        assert top.logprob == pytest.approx(float(exact[top.token_id]), abs=0.25)
