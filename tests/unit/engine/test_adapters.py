"""Tokens of adapters equal PEFT's, whatever else is in the batch; adapters come and go."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fabric.errors import AdapterUnavailable
from fabric.messages import Failed
from fabric.payloads.lora import CONFIG_FILE, WEIGHTS_FILE, digest_of, read_lora, read_peft
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
    driver = drive(save_model(model), shelf)

    def ask(ids, digest):
        return driver.greedy(ids, NUM_NEW, ignore_eos=True, adapter=digest)

    expected = [generate(made[0][0], ids) for ids in PROMPTS[:2]]
    assert expected[1] != generate(model, PROMPTS[1])
    assert [ask(ids, digests[0]).wait().ids() for ids in PROMPTS[:2]] == expected

    models, asked = [model, *(theirs for theirs, _ in made)], [None, *digests]
    for turn in range(2):
        order = [(ids, (i + turn) % 4) for i, ids in enumerate(PROMPTS)]
        heard = [ask(ids, asked[which]) for ids, which in order]
        expected = [generate(models[which], ids) for ids, which in order]
        assert [h.wait().ids() for h in heard] == expected
    assert sorted(shelf.asked) == sorted(digests)
    assert driver.engine.load().num_waiting == 0


@pytest.fixture(scope="module")
def made(reference, tmp_path_factory):
    """Three adapters of the tiny Llama, as we keep them."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(reference, folder / str(i), i)[1] for i in range(3)]


@pytest.fixture
def shelf(made):
    shelf = Shelf()
    shelf.digests = [shelf.put(data) for data in made]
    return shelf


def bytes_of_one(made):
    """What one of the adapters takes in the engine's memory, in float32."""
    layers = read_lora("one", made[0]).layers.values()
    return sum(len(x.data) for layer in layers for x in (layer.down, layer.up))


PROMPT = [5, 6, 7, 8, 9]


def test_evicted_adapters_come_back_with_the_same_tokens(drive, shelf, made):
    driver = drive(fetch_adapter=shelf, adapter_bytes=2 * bytes_of_one(made) + 1)
    first = [driver.greedy(PROMPT, adapter=d).wait().ids() for d in shelf.digests]
    assert len({tuple(ids) for ids in first}) == 3
    again = [driver.greedy(PROMPT, adapter=d).wait().ids() for d in shelf.digests]
    assert again == first
    stats = driver.engine.adapters
    assert stats.num_loads == 6
    assert stats.num_evictions == 4
    assert stats.num_bytes == 2 * bytes_of_one(made)
    # The one used longest ago goes first.
    assert stats.loaded == tuple(shelf.digests[1:])


def test_equal_prompts_of_other_adapters_share_no_cache(drive, shelf, made):
    driver = drive(fetch_adapter=shelf)
    prompt = [i % 200 for i in range(64)]
    whole = {}
    for digest in [None, *shelf.digests[:2]]:
        heard = driver.greedy(prompt, adapter=digest, cache_salt="mine").wait()
        assert heard.finished.usage.cached_prompt_tokens == 0
        whole[digest] = heard.ids()
    for digest, ids in whole.items():
        heard = driver.greedy(prompt, adapter=digest, cache_salt="mine").wait()
        assert heard.finished.usage.cached_prompt_tokens == 48
        assert heard.ids() == ids


def test_others_stream_while_an_adapter_loads_and_a_failed_load_ends_only_its_request(drive, shelf):
    driver = drive(fetch_adapter=shelf)
    shelf.gate.clear()
    waits = driver.greedy(PROMPT, adapter=shelf.digests[0])
    unknown = driver.greedy(PROMPT, adapter="blake3:" + "0" * 64)
    plain = driver.greedy(PROMPT).wait().ids()
    assert len(plain) == 12
    assert waits.events == []
    assert driver.engine.load().num_waiting == 2
    shelf.gate.set()
    assert len(waits.wait().ids()) == 12
    assert unknown.failed.failure.code == "adapter_unavailable"
    assert driver.greedy(PROMPT).wait().ids() == plain


def test_a_task_that_waits_for_its_adapter_can_be_cancelled_and_has_a_deadline(drive, shelf):
    driver = drive(fetch_adapter=shelf)
    shelf.gate.clear()
    loading = driver.greedy(PROMPT, adapter=shelf.digests[0])
    first = driver.last_task
    behind = driver.greedy(PROMPT, adapter=shelf.digests[1])
    driver.engine.cancel(driver.last_task.id, 1)
    assert behind.failed.failure.code == "request_cancelled"
    late = driver.greedy(PROMPT, adapter=shelf.digests[2], deadline_s=0.05)
    driver.engine.cancel(first.id, 1)
    threading.Event().wait(0.06)  # the deadline itself
    shelf.gate.set()
    assert loading.failed.failure.code == "request_cancelled"
    assert late.failed.failure.code == "deadline_exceeded"
    assert len(driver.greedy(PROMPT, adapter=shelf.digests[1]).wait().ids()) == 12


def test_running_requests_keep_their_adapter_and_others_wait_for_its_room(drive, shelf, made):
    driver = drive(fetch_adapter=shelf, adapter_bytes=bytes_of_one(made))
    alone = [driver.greedy(PROMPT, 60, adapter=d, ignore_eos=True) for d in shelf.digests]
    alone = [heard.wait().ids() for heard in alone]
    heard = [driver.greedy(PROMPT, 60, adapter=d, ignore_eos=True) for d in shelf.digests * 2]
    assert [h.wait().ids() for h in heard] == alone * 2
    assert driver.engine.adapters.num_bytes == bytes_of_one(made)


def test_an_adapter_over_the_budget_is_refused(drive, shelf, made):
    driver = drive(fetch_adapter=shelf, adapter_bytes=bytes_of_one(made) - 1)
    failure = driver.greedy(PROMPT, adapter=shelf.digests[0]).failed.failure
    assert failure.code == "adapter_memory_full"
    assert failure.detail["limit_bytes"] == bytes_of_one(made) - 1


def test_damaged_foreign_and_misshapen_files_end_their_request_alone(drive, shelf, made, tiny_llama,
                                                                     tmp_path):  # fmt: skip
    driver = drive(fetch_adapter=shelf)
    damaged = "blake3:" + "1" * 64
    shelf.files[damaged] = made[0]
    other = shelf.put(make_adapter(tiny_llama(hidden_size=32), tmp_path / "narrow", 1)[1])
    deep = shelf.put(make_adapter(tiny_llama(num_hidden_layers=3), tmp_path / "deep", 1)[1])
    nonsense = shelf.put(b"nonsense")
    heard = {d: driver.greedy(PROMPT, adapter=d) for d in (damaged, other, deep, nonsense)}
    codes = {d: h.failed.failure.code for d, h in heard.items()}
    assert codes == {damaged: "adapter_unavailable", other: "adapter_invalid",
                     deep: "adapter_invalid", nonsense: "adapter_invalid"}  # fmt: skip
    assert "shapes (4, 32)" in heard[other].failed.failure.message
    assert "layers.2" in heard[deep].failed.failure.message
    assert len(driver.greedy(PROMPT, adapter=shelf.digests[0]).wait().ids()) == 12


def test_an_engine_without_a_source_serves_no_adapters(tiny, made):
    assert not tiny.engine.info.limits.adapters
    failure = tiny.greedy(PROMPT, adapter=digest_of(made[0])).failed.failure
    assert failure.code == "adapter_invalid"


def test_closing_ends_what_waits_for_adapters(drive, shelf):
    driver = drive(fetch_adapter=shelf)
    shelf.gate.clear()
    heard = [driver.greedy(PROMPT, adapter=d) for d in shelf.digests]
    driver.engine.close()
    assert {h.failed.failure.code for h in heard} == {"engine_stopped"}
    shelf.gate.set()


def test_an_adapters_vector_is_its_own(drive, shelf):
    driver = drive(fetch_adapter=shelf)
    plain = driver.embed(PROMPT).vector
    theirs = driver.embed(PROMPT, task_adapter=shelf.digests[0]).vector
    assert max(abs(a - b) for a, b in zip(plain, theirs, strict=True)) > 0.01


def test_whatever_ends_a_task_lets_go_of_its_adapter(drive, shelf, made):
    driver = drive(fetch_adapter=shelf, adapter_bytes=2 * bytes_of_one(made))
    alone = {d: driver.greedy(PROMPT, 6, adapter=d).wait().ids() for d in [None, *shelf.digests]}
    asked = []
    for i in range(40):
        digest = [None, *shelf.digests][(i * i) % 4]
        prompt = [999] if i % 5 == 4 else PROMPT  # the vocabulary ends before
        asked.append((digest, driver.greedy(prompt, 6, adapter=digest)))
        if i % 7 == 3:
            driver.engine.cancel(driver.last_task.id, 1)
    for digest, heard in asked:
        heard.wait()
        assert isinstance(heard.events[-1], Failed) or heard.ids() == alone[digest]
    # Each needs room that only an adapter without users can give.
    for digest in shelf.digests:
        assert driver.greedy(PROMPT, 6, adapter=digest).wait().ids() == alone[digest]


def test_a_slot_is_paid_for_while_it_is_used_and_divided_among_those_who_use_it(drive, shelf):
    driver = drive(fetch_adapter=shelf)
    began_at = time.monotonic()
    one, two = shelf.digests[:2]
    together = [driver.greedy(PROMPT, 40, adapter=one, ignore_eos=True) for _ in range(4)]
    beside = driver.greedy(PROMPT, 40, adapter=two, ignore_eos=True)
    plain = driver.greedy(PROMPT, 4)
    used_s = [heard.wait().events[-1].usage.adapter_s for heard in together]
    alone_s = beside.wait().events[-1].usage.adapter_s
    elapsed_s = time.monotonic() - began_at
    assert min(*used_s, alone_s) > 0
    assert sum(used_s) <= elapsed_s
    assert alone_s <= elapsed_s
    assert plain.wait().events[-1].usage.adapter_s == 0
    # The time in which nobody used it is nobody's.
    threading.Event().wait(2 * elapsed_s)
    asked_at = time.monotonic()
    late = driver.greedy(PROMPT, 4, adapter=one).wait()
    assert late.events[-1].usage.adapter_s <= time.monotonic() - asked_at
