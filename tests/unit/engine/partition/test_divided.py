"""What the batch does with its cache happens on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Olmo2Config, Olmo2ForCausalLM

from fabric.engine.config import EngineConfig
from fabric.engine.partition.crew import Crew
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.errors import DigestMismatch, ModelNotLoadable, SettingInvalid

BOTH = {"tensor_parallel": 2, "pipeline_parallel": 2}
PROMPT = list(range(40, 140))
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def divided(drive):
    return drive(**BOTH)


def test_choices_share_one_prefill(divided, tiny):
    asked = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    several, expected = (one.ask(PROMPT, **asked).wait() for one in (divided, tiny))
    for choice in range(3):
        assert several.ids(choice) == expected.ids(choice)
    assert several.ids(0) != several.ids(1)


def test_a_cached_prefix_gives_the_same_tokens(divided):
    first, second = (divided.greedy(PROMPT, 12, cache_salt="one").finished for _ in range(2))
    assert second.usage.cached_prompt_tokens >= 80 > first.usage.cached_prompt_tokens
    heard = [divided.greedy(PROMPT, 12, cache_salt=salt).wait().ids() for salt in ("one", "two")]
    assert heard[0] == heard[1]


def test_rows_that_give_their_cache_up_are_computed_again(drive, tiny):
    small = drive(cache_bytes=160 * 16 * 4 * 4, max_rows=8, **BOTH)
    prompts = [[number] * 60 for number in range(6)]
    heard = [small.greedy(ids, 60, ignore_eos=True) for ids in prompts]
    expected = [tiny.greedy(ids, 60, ignore_eos=True).wait().ids() for ids in prompts]
    assert [one.wait().ids() for one in heard] == expected
    assert small.engine.load().num_preempted > 0


def test_a_row_that_is_not_finite_ends_alone(drive, tiny_llama, save_model):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = float("nan")
    broken = drive(save_model(model), **BOTH)
    bad, good = broken.greedy([5, 8, 5], 5), broken.greedy([5, 9, 5], 5)
    assert bad.failed.failure.code == "row_failed"
    assert good.finished


@pytest.mark.parametrize(
    ("changes", "layout", "remedy"),
    [
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, {"tensor_parallel": 2}, "at most 1"),
        ({}, {"pipeline_parallel": 4}, "pipeline_parallel to at most 2"),
        ({}, {"pipeline_parallel": 2, "stage_layers": (2, 1)}, "stage_layers"),
        ({}, {"tensor_parallel": 4, "partitioner": "deepspeed"}, "partitioner to torch"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_what_would(
    drive, tiny_llama, save_model, changes, layout, remedy
):
    path = save_model(tiny_llama(**changes))
    with pytest.raises(ModelNotLoadable, match=remedy):
        drive(path, **layout)
    assert drive(**BOTH).greedy([5], 2).finished, "the ranks are still there"


def test_a_family_that_ranks_cannot_divide_runs_in_stages(drive, save_model):
    torch.manual_seed(5)
    model = Olmo2ForCausalLM(  # its norms go over all heads at once
        Olmo2Config(
            vocab_size=259, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            initializer_range=0.2, eos_token_id=None, pad_token_id=258,
        )
    )  # fmt: skip
    path = save_model(model)
    with pytest.raises(ModelNotLoadable, match="use pipeline_parallel"):
        drive(path, tensor_parallel=2)
    whole, stages = drive(path), drive(path, pipeline_parallel=2)
    heard = [one.greedy(PROMPT, 12, ignore_eos=True).wait().ids() for one in (whole, stages)]
    assert heard[0] == heard[1]


def test_a_damaged_file_is_refused_by_all_ranks_and_none_hangs(drive, tiny_dir, tmp_path):
    path = copy_of(tiny_dir, tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelNotLoadable, match="cannot be read"):
        drive(path, **BOTH)
    tensors = load_file(tiny_dir / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelNotLoadable, match=r"layers\.1\.self_attn\.q_proj"):
        drive(path, **BOTH)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelNotLoadable, match=r"layers\.1\.self_attn\.q_proj"):
        drive(path, **BOTH)


def test_other_tensors_than_were_asked_for_are_refused(crew, tiny_dir):
    config = EngineConfig(dtype="float32", num_threads=1, cache_bytes=2**22, tensor_parallel=4)
    engine = TorchEngine(
        ModelSource.parse(str(tiny_dir)),
        config,
        name="tiny",
        expected_digest="blake3:" + "0" * 64,
        crew=crew,
    )
    with pytest.raises(DigestMismatch):
        engine.start()


def test_files_in_several_parts_and_another_dtype_are_read(drive, tiny_dir, tmp_path):
    whole = drive(dtype="bfloat16")
    path = copy_of(tiny_dir, tmp_path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, path / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    divided = drive(path, dtype="bfloat16", **BOTH)
    assert divided.engine.info.digest == whole.engine.info.digest


def test_a_process_is_rank_0_of_one_crew(crew):
    with pytest.raises(SettingInvalid, match="one divided model"):
        Crew(num_ranks=2).start()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel": 0},
        {"pipeline_parallel": 2, "stage_layers": (1,)},
        {"pipeline_parallel": 2, "stage_layers": (2, 0)},
        {"tensor_parallel": 2, "local_ranks": 3},
        {"tensor_parallel": 2, "local_ranks": 1},
        {"rank_timeout_s": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(SettingInvalid):
        EngineConfig(**wrong)


def copy_of(path: Path, target: Path) -> Path:
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
