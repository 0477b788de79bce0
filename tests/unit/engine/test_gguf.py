"""A GGUF file gives the model and the tokenizer that were written into it."""

from __future__ import annotations

import gguf
import pytest
import torch

from fabric.engine.model import load_model
from fabric.engine.source import ModelSource

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight, num_heads):
    """Rotary halves as llama.cpp orders them: pair by pair instead of half by half."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def gguf_file(reference, tiny, tmp_path_factory):
    config, tokenizer = reference.config, tiny.texts._tokenizer
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens[258], tokens[tokens.index("Ā")] = "ab", "cd"  # a byte-pair vocabulary has merges
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    )
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in reference.state_dict().items():
        part, _, kind = name.rpartition(".")
        prefix = ""
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            prefix = f"blk.{layer}."
        if "q_proj" in part or "k_proj" in part:
            heads = config.num_attention_heads if "q_" in part else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        writer.add_tensor(f"{prefix}{NAMES[part]}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_model_and_its_tokenizer_come_back(gguf_file, reference):
    loaded = load_model(ModelSource.parse(str(gguf_file)), name="m", dtype="float32")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded.model(ids).logits, reference(ids).logits, atol=1e-5)
    assert loaded.eos_ids == {256}
    assert loaded.context_tokens == 256
    tokenizer = loaded.tokenizer
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<end>", "<start>")
    assert tokenizer("ab<end>é")["input_ids"][:2] == [258, 256]
    assert tokenizer.decode(tokenizer("naïve 🎉 .")["input_ids"]) == "naïve 🎉 ."


def test_the_engine_serves_it(gguf_file, drive, tiny):
    assert (
        drive(gguf_file).greedy([5, 6, 7], 12).wait().ids()
        == tiny.greedy([5, 6, 7], 12).wait().ids()
    )
