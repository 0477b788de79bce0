"""Tokens of adapters equal PEFT's, whatever else is in the batch; adapters come and go."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fabric.errors import AdapterUnavailable
from fabric.payloads.lora import CONFIG_FILE, WEIGHTS_FILE, digest_of, read_peft
from fabric.testing.families import FAMILIES

PROMPTS = [
    [3],
    [(5 * i) % 250 for i in range(70)],
    [7, 8, 9] * 9,
    [(i * i) % 250 for i in range(33)],
]
NUM_NEW = 12
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Shelf:
    """Adapters by digest, and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, digest: str) -> bytes:
        self.asked.append(digest)
        assert self.gate.wait(60)
        if digest not in self.files:
            raise AdapterUnavailable(digest=digest, reason="the shelf does not have it")
        return self.files[digest]

    def put(self, data: bytes) -> str:
        digest = digest_of(data)
        self.files[digest] = data
        return digest


def targets_of(model):
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Conv1D)}
    return sorted(names) or ATTENTION


def make_adapter(model, path: Path, seed, *, rank=4, scale=0.3, **config):
    """Return PEFT's own model of a random adapter, and the adapter as we keep it."""
    torch.manual_seed(seed)
    values = {"target_modules": targets_of(model), "r": rank, "lora_alpha": 3 * rank}
    values["fan_in_fan_out"] = any(isinstance(m, Conv1D) for m in model.modules())
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**(values | config)))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale)
    theirs.save_pretrained(path)
    ours = read_peft("made", (path / CONFIG_FILE).read_bytes(), (path / WEIGHTS_FILE).read_bytes())
    return theirs.eval(), ours.to_bytes()


def generate(model, ids):
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_peft_alone_and_three_adapters_mixed_with_a_plain_row(
    family, save_model, drive, tmp_path
):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation("eager")  # the others leave capped scores out
    shelf = Shelf()
    kinds = [{"rank": 4}, {"rank": 1, "use_rslora": True}, {"rank": 8, "lora_alpha": 5}]
    made = [make_adapter(model, tmp_path / str(i), i, **kind) for i, kind in enumerate(kinds)]
    digests = [shelf.put(data) for _, data in made]
    plain = [generate(model, ids) for ids in PROMPTS]
    driver = drive(save_model(model), shelf)

    def ask(ids, digest):
        return driver.greedy(ids, NUM_NEW, ignore_eos=True, adapter=digest)

    expected = [generate(made[0][0], ids) for ids in PROMPTS]
    assert expected != plain
    assert [ask(ids, digests[0]).wait().ids() for ids in PROMPTS] == expected

    models, asked = [model, *(theirs for theirs, _ in made)], [None, *digests]
    for turn in range(2):
        order = [(ids, (i + turn) % 4) for i, ids in enumerate(PROMPTS)]
        heard = [ask(ids, asked[which]) for ids, which in order]
        expected = [generate(models[which], ids) for ids, which in order]
        assert [h.wait().ids() for h in heard] == expected
    assert sorted(shelf.asked) == sorted(digests)
    assert driver.engine.load().num_waiting == 0
