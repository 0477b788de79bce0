"""Under mixed load for a while, memory and free cache blocks stay where they were.

Forty seconds by default; ``FABRIC_SOAK_S=1800`` makes it half an hour.
"""

from __future__ import annotations

import os
import random
import threading
import time

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import Accepted, Failed, Finished, Request, Sampling, Task, TokensInput
from fabric.testing.hub import wait_until

SOAK_S = float(os.environ.get("FABRIC_SOAK_S", "40"))
IN_FLIGHT = 12
ALLOWED_BYTES = 24 * 2**20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SOAK_S + 240)]


@pytest.fixture
def engine(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    vocabulary = {f"<{i}>": i for i in range(300)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<1>").save_pretrained(tmp_path)
    settings = EngineConfig(
        dtype="float32", num_threads=1, cache_bytes=2**20, max_rows=8, step_tokens=96
    )
    engine = TorchEngine(ModelSource.parse(str(tmp_path)), settings, name="soak")
    engine.start()
    yield engine
    engine.close()


class Soak:
    """Keeps tasks of all kinds in flight; every one must end as its kind does."""

    def __init__(self, engine):
        self._engine = engine
        self._random = random.Random(0)
        self._room = threading.Semaphore(IN_FLIGHT)
        self.surprises = []
        self.num_ended = 0

    def run(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.surprises:
            self._room.acquire()
            self._submit()
        for _ in range(IN_FLIGHT):
            assert self._room.acquire(timeout=120)
        for _ in range(IN_FLIGHT):
            self._room.release()

    def _submit(self):
        chance = self._random
        prefix = [2 + chance.randrange(4)] * chance.choice([1, 40, 160, 300])
        ids = (*prefix, *(chance.randrange(2, 300) for _ in range(chance.randrange(1, 20))))
        cancelled = chance.random() < 0.15
        request = Request(
            model="soak",
            input=TokensInput(ids=ids),
            sampling=Sampling(
                max_tokens=chance.choice([None, 1, 20, 100]),
                temperature=chance.choice([0.0, 1.0]),
                n=chance.choice([1, 1, 1, 2]),
                logprobs=chance.choice([None, 2]),
                prompt_logprobs=chance.random() < 0.1,
            ),
            tier=chance.choice(["interactive", "standard", "batch"]),
        )

        def sink(event):
            if cancelled and isinstance(event, Accepted):
                self._engine.cancel(request.id, 1)
            if isinstance(event, Failed) and event.failure.code != "request_cancelled":
                self.surprises.append(event)
            if isinstance(event, Failed | Finished):
                self.num_ended += 1
                self._room.release()

        task = Task(
            id=request.id, attempt=1, request=request, digest=self._engine.info.digest,
            deadline_s=300.0, cache_salt=chance.choice(["a", "b", ""]),
        )  # fmt: skip
        self._engine.submit(task, sink)


def test_nothing_grows(engine):
    soak = Soak(engine)
    soak.run(SOAK_S / 4)
    process = psutil.Process()
    before = process.memory_info().rss
    soak.run(SOAK_S)

    def idle() -> bool:
        load = engine.load()
        return (load.num_running, load.num_waiting, load.cache_usage) == (0, 0, 0.0)

    wait_until(idle)  # the load is told after the step that the last answer came from
    load = engine.load()
    assert soak.surprises == []
    assert soak.num_ended > SOAK_S
    assert load.num_preempted > 0
    assert load.prefix_found_tokens > 0
    assert process.memory_info().rss - before < ALLOWED_BYTES
