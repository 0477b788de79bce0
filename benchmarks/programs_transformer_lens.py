"""The peer of the patch grid of ``benchmarks/programs.py``: TransformerLens over the same weights.

    python programs_transformer_lens.py MODEL_DIRECTORY

Runs in an environment of its own that has TransformerLens. Reads one line of JSON, the layers,
the clean and the corrupt prompt's ids and two tokens, and prints the CPU seconds of the grid and
the logit of one token over the other's in every cell: all positions of a layer in one batch, as
its documentation does it.
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


def grid(layers, clean, corrupt, answers):
    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in layers}
    _, kept = bridge.run_with_cache(
        torch.tensor([clean]), names_filter=lambda name: name in names.values()
    )
    rows = torch.arange(len(corrupt))
    prompts = torch.tensor([corrupt]).expand(len(corrupt), -1)
    effect = []
    for name in names.values():

        def patch(x, hook, name=name):  # noqa: ARG001 - it is called by keyword
            x = x.clone()
            x[rows, rows] = kept[name][0]
            return x

        logits = bridge.run_with_hooks(prompts, fwd_hooks=[(name, patch)])
        one, other = logits[:, -1, answers].float().unbind(-1)
        effect.append((one - other).tolist())
    return effect


given = json.loads(sys.stdin.readline())
with torch.inference_mode():
    grid(**given | {"layers": given["layers"][:1]})
    started = time.process_time()
    found = grid(**given)
print(json.dumps({"cpu_s": time.process_time() - started, "effect": found}), flush=True)
os._exit(0)
