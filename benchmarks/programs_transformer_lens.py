"""The peer of the patch grid of ``benchmarks/programs.py``: TransformerLens over the same weights.

    python programs_transformer_lens.py MODEL_DIRECTORY

Runs in an environment of its own that has TransformerLens. Reads one line of JSON, the layers and
the clean and the corrupt prompt's ids, and prints the CPU seconds of the grid and the token that
comes first in every cell: all positions of a layer in one batch, as its documentation does it.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
path = sys.argv[1]
bridge = TransformerBridge.boot_transformers(
    path,
    hf_model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(),
    tokenizer=AutoTokenizer.from_pretrained(path),
    dtype=torch.bfloat16,
    device="cpu",
)


def grid(layers, clean, corrupt):
    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in layers}
    _, kept = bridge.run_with_cache(
        torch.tensor([clean]), names_filter=lambda name: name in names.values()
    )
    rows = torch.arange(len(corrupt))
    prompts = torch.tensor([corrupt]).expand(len(corrupt), -1)
    first = []
    for name in names.values():

        def patch(x, hook, name=name):  # noqa: ARG001 - it is called by keyword
            x = x.clone()
            x[rows, rows] = kept[name][0]
            return x

        logits = bridge.run_with_hooks(prompts, fwd_hooks=[(name, patch)])
        first.append(logits[:, -1].argmax(-1).tolist())
    return first


given = json.loads(sys.stdin.readline())
with torch.inference_mode():
    grid(given["layers"][:1], given["clean"], given["corrupt"])
    started = time.process_time()
    found = grid(**given)
print(json.dumps({"cpu_s": time.process_time() - started, "first": found}), flush=True)
os._exit(0)
