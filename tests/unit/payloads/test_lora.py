"""PEFT's files are read as PEFT means them, and everything else is refused by name."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import AdapterInvalid
from fabric.payloads.lora import digest_of, read_lora, read_peft
from fabric.testing.lora import factor, peft_config, peft_weights

Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def test_an_adapter_survives_its_own_file():
    lora = read_peft("mine", peft_config(), peft_weights())
    layer = lora.layers[Q]
    assert (layer.down.shape, layer.up.shape, layer.scale, lora.rank) == ((2, 8), (8, 2), 2.0, 2)
    data = lora.to_bytes()
    again = read_lora("mine", data)
    assert again.layers[Q].scale == 2.0
    assert bytes(again.layers[Q].up.data) == bytes(layer.up.data)
    assert digest_of(again.to_bytes()) == digest_of(data)
    assert digest_of(read_peft("x", peft_config(lora_alpha=5), peft_weights()).to_bytes()) != (
        digest_of(data)
    )


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 7}}, 3.5),
        ({"alpha_pattern": {"k_proj": 7, "self_attn.q_proj": 9}}, 4.5),
        ({"alpha_pattern": {f"^{Q}": 7}}, 3.5),
        ({"alpha_pattern": {"^q_proj": 7, "proj": 9}}, 2.0),
        ({"r": 16, "rank_pattern": {"q_proj": 2}}, 2.0),
        ({"r": 16, "rank_pattern": {Q: 2}, "use_rslora": True}, 4 / math.sqrt(2)),
        ({"target_modules": "all-linear", "fan_in_fan_out": True, "lora_dropout": 0.1}, 2.0),
    ],
)
def test_scales_are_pefts(changes, scale):
    lora = read_peft("mine", peft_config(**changes), peft_weights())
    assert lora.layers[Q].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"something_new": 3}, "something_new"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 3}, "rank 2"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "2"}, "r is '2'"),
        ({"r": 10**9}, "1000000000"),
        ({"lora_alpha": "4"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 2}}, "regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "v_proj"]}, "v_proj"),
        ({"target_modules": 7}, "target_modules"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(changes, reason):
    with pytest.raises(AdapterInvalid, match=reason) as caught:
        read_peft("mine", peft_config(**changes), peft_weights())
    assert caught.value.detail["adapter"] == "mine"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "cannot be read"),
        (b" " * (2**20 + 1), "bytes"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN, "r": 2}', "lora_alpha"),
        (b"{}", "peft_type"),
    ],
)
def test_configurations_that_are_none_are_refused(config, reason):
    with pytest.raises(AdapterInvalid, match=reason):
        read_peft("mine", config, peft_weights())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no tensors"),
        ({A: factor(2, 8)}, "only one of its factors"),
        ({A: factor(2, 8), B: factor(8, 3)}, "shapes"),
        ({A: factor(2, 8), B: ((16,), [0.0] * 16)}, "shapes"),
        ({A: factor(0, 8), B: factor(8, 0)}, "shapes"),
        ({A: ((2, 8), [math.nan] * 16), B: factor(8, 2)}, "not finite"),
        ({A: factor(2, 8), B: ((8, 2), [math.inf] + [0.0] * 15)}, "not finite"),
        ({A: factor(2, 8), B: factor(8, 2), "base_model.model.lm_head.weight": factor(1, 1)},
         "lm_head"),
        ({A.replace("lora_A", "lora_embedding_A"): factor(2, 8)}, "lora_embedding_A"),
        ({A.removeprefix("base_model.model."): factor(2, 8)}, "no factor"),
        ({"base_model.model.../../etc.lora_A.weight": factor(2, 8)}, "no factor"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_plain_lora_are_refused(tensors, reason):
    with pytest.raises(AdapterInvalid, match=reason):
        read_peft("mine", peft_config(target_modules=None), peft_weights(tensors))


def lying(**entry: object) -> bytes:
    """Return a file whose header says something else than what is there."""
    whole = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]} | entry
    head = json.dumps({A: whole}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(64)


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"PK\x03\x04 a pickle in a zip",
        (2**63).to_bytes(8, "little") + bytes(100),
        peft_weights()[:-1],
        peft_weights() + b"\0",
        lying(shape=[2**20, 2**20]),
        lying(shape=[-2, -8]),
        lying(data_offsets=[0, 2**40]),
        lying(data_offsets=[8, 64]),
        lying(dtype="F64"),
        lying(dtype="PICKLE"),
    ],
)
def test_files_that_lie_about_themselves_are_refused(weights):
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors"):
        read_peft("mine", peft_config(), weights)


@given(st.integers(0, 700), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_changes_the_digest(at, byte):
    data = bytearray(read_peft("mine", peft_config(), peft_weights()).to_bytes())
    before = digest_of(bytes(data))
    at %= len(data)
    same = data[at] == byte
    data[at] = byte
    assert same or digest_of(bytes(data)) != before
    try:
        read_lora("mine", bytes(data))
    except AdapterInvalid:
        assert not same
