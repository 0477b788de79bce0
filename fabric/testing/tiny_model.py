"""A tiny Llama with random weights and a tokenizer of bytes, as a transformers directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CONTEXT_TOKENS = 256
SPECIALS = ("<end>", "<start>", "<unused>")
VOCABULARY = 256 + len(SPECIALS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so most characters that are not ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",  # noqa: S106
        chat_template=(
            "{% for m in messages %}{{ '<start>' + m['role'] + ':' + m['content'] + '<end>' }}"
            "{% if m['role'] == 'system' and not loop.first %}"
            "{{ raise_exception('the system turn comes first') }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<start>assistant:{% endif %}"
        ),
    )


def tiny_config(**changes: object) -> LlamaConfig:
    """Return a Llama's configuration, a few values changed."""
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 258,
    }
    return LlamaConfig(**(values | changes))


def save(model: PreTrainedModel, path: Path) -> Path:
    """Write a model with the byte tokenizer."""
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def save_tiny_llama(path: Path, **changes: object) -> Path:
    """Write a Llama whose weights are the same every time."""
    torch.manual_seed(7)
    return save(LlamaForCausalLM(tiny_config(**changes)), path)


def save_tiny_sentences(
    path: Path, pooling: str = "mean_tokens", parts: tuple[str, ...] = (), **changes: object
) -> Path:
    """Write a BERT with random weights as sentence-transformers writes a model.

    Args:
        path: Its directory.
        pooling: By sentence-transformers' name, without ``pooling_mode_``.
        parts: Modules after the usual ones.
        changes: Of its configuration.
    """
    torch.manual_seed(11)
    config: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
    }
    save(BertModel(BertConfig(**(config | changes))), path)
    names = ("Transformer", "Pooling", "Normalize", *parts)
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{name}" if at else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for at, name in enumerate(names)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{kind}": kind == pooling for kind in ("cls_token", "mean_tokens")}
    flags[f"pooling_mode_{pooling}"] = True
    (path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    limit = {"max_seq_length": 100, "do_lower_case": False}
    (path / "sentence_bert_config.json").write_text(json.dumps(limit))
    return path
