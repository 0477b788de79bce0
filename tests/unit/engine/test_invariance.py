"""With ``batch_invariant``, what a request gets depends on nothing but the request, bit by bit."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fabric.engine import fused
from fabric.errors import ModelNotLoadable

PROMPT = [(7 * i) % 250 for i in range(75)]
HOW = {"temperature": 0.7, "seed": 3, "max_tokens": 24, "logprobs": 5, "ignore_eos": True}
SMALL_CACHE = {"float32": 2**18, "bfloat16": 2**17}


@pytest.fixture(params=["float32", "bfloat16"])
def invariant(request, drive, kernels, restored_rotation):
    """Start an engine whose answers may not depend on the batch."""

    def start(*, small: bool = False, **config):
        if small:
            config["cache_bytes"] = SMALL_CACHE[request.param]
        return drive(batch_invariant=True, dtype=request.param, **config)

    return start


@pytest.fixture
def restored_rotation(monkeypatch):
    """Put back transformers' function, which an engine on the kernels replaces for good."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", fused._llama_rotate)


def bits(heard):
    """Everything the answer says, with its log probabilities to the last bit."""
    return [(t.token_id, t.logprob, t.top_logprobs) for t in heard.wait().tokens()]


def test_the_same_bits_alone_in_a_crowd_cached_and_in_other_chunks(invariant):
    driver = invariant()
    alone = bits(driver.ask(PROMPT, **HOW))
    crowd = [driver.ask([i, *PROMPT[i:]], temperature=1.0, max_tokens=30) for i in range(8)]
    assert bits(driver.ask(PROMPT, **HOW)) == alone
    assert all(heard.finished for heard in crowd)

    driver.greedy(PROMPT[:70], 1, cache_salt="a").wait()
    cached = driver.ask(PROMPT, cache_salt="a", **HOW)
    assert cached.finished.usage.cached_prompt_tokens == 64
    assert bits(cached) == alone

    for step_tokens in (17, 256):
        assert bits(invariant(step_tokens=step_tokens).ask(PROMPT, **HOW)) == alone


def test_the_same_bits_when_computed_again(invariant):
    prompts = [[i, *PROMPT[:40]] for i in range(4)]
    how = HOW | {"max_tokens": 100}
    roomy, small = invariant(), invariant(small=True)
    expected = [bits(roomy.ask(prompt, **how)) for prompt in prompts]
    heard = [small.ask(prompt, **how) for prompt in prompts]
    assert [bits(h) for h in heard] == expected
    assert small.engine.load().num_preempted > 0


def test_the_same_bits_with_guesses(invariant, monkeypatch):
    monkeypatch.setattr("fabric.engine.speculation._LEAST_GAIN", 0.0)
    how = HOW | {"temperature": 0.0, "max_tokens": 60}
    plain, guessing = invariant(), invariant(speculation="lookup")
    for token in (5, 7, 12, 40):
        heard = guessing.ask([token] * 40, **how)
        assert bits(heard) == bits(plain.ask([token] * 40, **how))
    assert guessing.engine.load().accepted_tokens > 0


def test_a_model_whose_bits_depend_on_the_batch_is_refused(drive, save_model):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 259}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=256))

    def add_noise(module, args, output):
        return output + 1e-6 * output.shape[1]

    path = save_model(experts)
    original = MixtralForCausalLM.from_pretrained.__func__

    def with_noise(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        model.model.layers[0].register_forward_hook(add_noise)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtralForCausalLM, "from_pretrained", classmethod(with_noise))
        with pytest.raises(ModelNotLoadable, match="serve it without batch_invariant"):
            drive(path, batch_invariant=True)
