"""The peer of ``benchmarks/programs.py``: nnsight over the same toy, a round for every line read.

Runs in an environment of its own that has nnsight. A step is a forward pass of one token over the
keys and values of 16, as one of the engine's steps of decoding is; CPU seconds, the median of 30.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time

import torch
from nnsight import NNsight
from transformers import DynamicCache, LlamaForCausalLM

torch.set_num_threads(1)
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
traced = NNsight(model)
vector = torch.randn(model.config.hidden_size)
past = DynamicCache()
with torch.inference_mode():
    model(torch.tensor([list(range(20, 36))]), past_key_values=past)


def inputs():
    return {"input_ids": torch.tensor([[7]]), "past_key_values": copy.deepcopy(past)}


def plain(given):
    model(**given)


def steer(given):
    with traced.trace(**given):
        traced.model.layers[4].output[:] = traced.model.layers[4].output + 2.0 * vector


def save_all(given):
    with traced.trace(**given):
        [layer.output.save() for layer in traced.model.layers]


SIDES = {"plain": plain, "steer": steer, "save all": save_all}
for _ in sys.stdin:
    seen = {name: [] for name in SIDES}
    with torch.inference_mode():
        for _ in range(30):
            for name, side in SIDES.items():
                given = inputs()
                started = time.thread_time()
                side(given)
                seen[name].append(time.thread_time() - started)
    print(json.dumps({name: statistics.median(times) for name, times in seen.items()}), flush=True)
