"""Weights that stay in the files give the same tokens in less memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from fabric.errors import ModelNotLoadable

PROMPT = list(range(40, 90))
SIZES = {"vocab_size": 259, "max_position_embeddings": 256, "eos_token_id": None}
FAMILIES = {
    "llama": None,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=48, n_layer=3, n_head=3, n_positions=256)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        )
    ),
}  # fmt: skip

MEASURE = """
import json, sys, threading
from pathlib import Path
from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import Finished, Request, Sampling, Task, Token, TokensInput
path, offload = sys.argv[1:]
config = EngineConfig(dtype="float32", num_threads=1, cache_bytes=2**24, offload=offload)
engine = TorchEngine(ModelSource.parse(path), config, name="big")
engine.start()
done, ids = threading.Event(), []
def sink(event):
    if isinstance(event, Token):
        ids.append(event.token_id)
    if isinstance(event, Finished):
        done.set()
sampling = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True)
request = Request(model="big", input=TokensInput(ids=(5, 6, 7)), sampling=sampling)
engine.submit(
    Task(id=request.id, attempt=1, request=request, digest=engine.info.digest, deadline_s=100.0),
    sink,
)
assert done.wait(100)
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps({"ids": ids, "peak_bytes": peak, "digest": engine.info.digest}))
engine.close()
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2, "pipeline_parallel": 2}])
@pytest.mark.timeout(300)
def test_layers_read_when_they_run_give_the_same_tokens(
    family, layout, drive, save_model, tiny_llama
):
    torch.manual_seed(5)
    path = save_model((FAMILIES[family] or tiny_llama)())
    resident, streamed = drive(path), drive(path, offload="disk", **layout)
    assert streamed.engine.info.digest == resident.engine.info.digest
    heard = [one.greedy(PROMPT, 12, ignore_eos=True).wait().ids() for one in (resident, streamed)]
    assert heard[0] == heard[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_needs_less_memory_than_the_model_has_weights(save_model, tiny_llama):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = tiny_llama(**sizes, num_attention_heads=8, num_key_value_heads=8)
    layer_bytes = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    path = save_model(model)
    del model
    measured = {}
    for offload in ("none", "disk"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), offload],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        measured[offload] = json.loads(done.stdout.splitlines()[-1])
    assert measured["disk"]["ids"] == measured["none"]["ids"]
    assert measured["disk"]["digest"] == measured["none"]["digest"]
    # Of eight layers two are in memory, and a third may be on its way out.
    saved = measured["none"]["peak_bytes"] - measured["disk"]["peak_bytes"]
    assert saved > 4 * layer_bytes, measured


def test_memory_that_the_weights_are_in_already_is_refused(drive):
    with pytest.raises(ModelNotLoadable, match="disk"):
        drive(offload="host")
