"""An adapter from PEFT to an answer: uploaded, fetched by a real instance, its owner's alone."""

from __future__ import annotations

import math
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fabric.errors import AdapterInvalid, FabricError, NotFound
from fabric.messages import EngineOptions, InstanceSpec, InstanceState, Launch
from fabric.sdk import Fabric
from fabric.testing.commands import get_environ, read_blocks, run_blocks
from fabric.testing.hub import MODEL, RunningHub, running_hub, wait_until
from fabric.testing.rig import InstanceProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs/adapters.md"
WORDS = [f"w{i}" for i in range(63)]
END = len(WORDS)
PROMPT = "w1 w2 w3 w4 w5"
NUM_NEW = 24


@dataclass(frozen=True)
class World:
    """A hub with one instance over a tiny model, and adapters as PEFT saved them."""

    hub: RunningHub
    fabric: Fabric
    model: LlamaForCausalLM
    folder: Path

    def adapter(self, name: str) -> Path:
        return self.folder / name

    def expected(self, name: str | None) -> str:
        """Return what transformers and PEFT generate."""
        model = self.model
        if name is not None:
            fresh = LlamaForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)
            model = peft.PeftModel.from_pretrained(fresh, self.adapter(name)).eval()
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                             max_new_tokens=NUM_NEW, do_sample=False)  # fmt: skip
        return " ".join(WORDS[i] for i in out[0, 5:].tolist() if i != END)

    def ask(self, adapter: str | None, fabric: Fabric | None = None) -> str:
        answer = (fabric or self.fabric).complete(
            PROMPT, max_tokens=NUM_NEW, temperature=0, adapter=adapter
        )
        return answer.text.strip()


def make_model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.2, bos_token_id=None, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<end>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    return model


def make_adapter(folder: Path, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(model, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / name)


def start_instance(hub: RunningHub, folder: Path) -> InstanceProcess:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    spec = InstanceSpec(
        launch=Launch(
            instance=launch.instance,
            site="alpha",
            model=launch.model,
            source=str(folder / "model"),
            digest=None,
            token=token,
        ),
        session_url=hub.session_url,
        direct_token=secrets.token_urlsafe(16),
        options=EngineOptions(dtype="float32", num_threads=1, cache_bytes=8 * 2**20),
        status_path=str(folder / f"{launch.instance}.json"),
    )
    command = [sys.executable, "-m", "fabric.instance"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(spec.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    return InstanceProcess(spec=spec, process=process)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    model = make_model(folder / "model")
    for seed, name in enumerate(["poet", "critic", "plain-spoken"], 1):
        make_adapter(folder, name, seed)
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_site("alpha")
        instance = start_instance(hub, folder)
        try:
            instance.wait_for(InstanceState.READY, timeout_s=120)
            wait_until(lambda: len(hub.broker.replicas()) == 1, timeout_s=60)
            with Fabric(hub.base_url, hub.api_key, timeout_s=120) as fabric:
                yield World(hub=hub, fabric=fabric, model=model, folder=folder)
        finally:
            assert instance.process.stdin is not None
            instance.process.stdin.close()  # it ends with its parent
            instance.process.wait(60)


def test_answers_are_pefts_and_records_name_the_adapter(world: World) -> None:
    plain = world.ask(None)
    assert plain == world.expected(None)
    for name in ("poet", "critic"):
        added = world.fabric.add_adapter(world.adapter(name))
        assert added.name == name
        answer = world.fabric.complete(PROMPT, max_tokens=NUM_NEW, temperature=0, adapter=name)
        assert answer.text.strip() == world.expected(name) != plain
        run = world.fabric.run(answer.run_id)
        assert run.adapter == added.digest
        assert run.state == "completed"
    assert world.ask(None) == plain
    assert {"critic", "poet"} <= {one.name for one in world.fabric.adapters()}


def test_the_slot_of_an_adapter_is_charged_by_the_time_it_is_used(world: World) -> None:
    """A price of 3.6 SU an hour is 3.6 micro-SU for a millionth of an hour, begun ones included."""
    world.fabric.add_adapter(world.adapter("critic"))
    free = {"prompt_usu": 0, "cached_prompt_usu": 0, "output_usu": 0}
    world.hub.ledger.set_rate("*", "alpha", **free, adapter_usu=3_600_000)

    def is_charged(adapter: str | None) -> bool:
        answer = world.fabric.complete(PROMPT, max_tokens=NUM_NEW, adapter=adapter)
        run = world.fabric.run(answer.run_id)
        if run.state != "completed":
            return False  # its record is being written
        used_s = run.usage.adapter_s
        assert (used_s > 0) == (adapter is not None)
        charge_usu = math.ceil(math.ceil(used_s / 3600 * 1e6) * 3.6)
        if answer.charge_usu != charge_usu:
            return False  # by the former price: the hub has not read the new one yet
        if not charge_usu:
            return True
        lines = {line.run: line for line in world.fabric.usage().lines}
        return lines[answer.run_id].amount_usu == -charge_usu

    wait_until(lambda: is_charged("critic"), timeout_s=60)
    wait_until(lambda: is_charged(None), timeout_s=60)


def test_openai_clients_name_an_adapter_in_the_fabric_object(world: World) -> None:
    digest = world.fabric.add_adapter(world.adapter("poet")).digest
    client = openai.OpenAI(base_url=world.hub.openai_url, api_key=world.hub.api_key, timeout=120)
    reply = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=NUM_NEW, temperature=0,
        extra_body={"fabric": {"adapter": "poet"}},
    )  # fmt: skip
    assert reply.choices[0].text.strip() == world.expected("poet")
    assert reply.model_extra is not None
    assert reply.model_extra["fabric"]["adapter"] == digest
    client.close()


def test_another_project_cannot_use_it(world: World) -> None:
    world.fabric.add_adapter(world.adapter("poet"))
    world.hub.keys.add_project("chemistry")
    world.hub.ledger.grant(world.hub.ledger.open_allocation("chemistry", "*"), 10**9)
    _, key = world.hub.keys.add_key("chemistry")
    with Fabric(world.hub.base_url, key, timeout_s=120) as stranger:
        assert world.ask(None, stranger)
        with pytest.raises(NotFound):
            world.ask("poet", stranger)
        assert stranger.adapters() == ()


def test_a_stream_goes_on_when_its_adapter_is_deleted(world: World) -> None:
    world.fabric.add_adapter(world.adapter("plain-spoken"))
    expected = world.expected("plain-spoken")
    with world.fabric.stream(PROMPT, max_tokens=400, temperature=0, adapter="plain-spoken") as s:
        pieces = [next(iter(s)).text]
        world.fabric.delete_adapter("plain-spoken")
        with pytest.raises(FabricError) as caught:
            world.ask("plain-spoken")
        assert caught.value.code == "not_found"
        pieces += [chunk.text for chunk in s]
    assert "".join(pieces).strip().startswith(expected)
    assert world.ask(None) == world.expected(None)


def test_the_page_runs_as_written(world: World, tmp_path: Path) -> None:
    environ = get_environ(tmp_path, world.hub, MODEL=MODEL)
    outputs = run_blocks(read_blocks(PAGE), environ, world.folder)
    added, *_, words = outputs[0].splitlines()
    assert added == "poet"
    assert words.split()[0].startswith("w")
    first, second = outputs[1].split()
    assert first == second
    assert first.startswith("blake3:")
    assert "poet" not in {one.name for one in world.fabric.adapters()}


def test_what_cannot_be_served_is_refused_before_or_at_its_first_use(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(AdapterInvalid, match="No such file"):
        world.fabric.add_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterInvalid, match="safe_serialization"):
        world.fabric.add_adapter(tmp_path)
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=96, intermediate_size=64,
                                        num_hidden_layers=1, num_attention_heads=4))  # fmt: skip
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(wide, config).save_pretrained(tmp_path / "wide")
    world.fabric.add_adapter(tmp_path / "wide")
    with pytest.raises(AdapterInvalid, match="shapes"):
        world.ask("wide")
    assert world.ask(None) == world.expected(None)
