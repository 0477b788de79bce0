"""``python -m fabric.testing.pretend_gpu``: steps of every family on a GPU that computes nothing.

Its tensors have a device, a shape and a dtype, but no values. torch refuses to mix them with the
CPU's, and to read one, as a GPU would refuse to while a graph is captured. So a step that runs here
leaves nothing on the wrong device, and a decoding step from fixed buffers waits for nothing. The
kernels themselves are for a real one to show. What is printed is JSON: by family and step, the
logits' device and shape, or the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from fabric.engine import adjustments, attention, cache, flex, graphs, runner, sampling
from fabric.engine.adjustments import Adjustment
from fabric.engine.attention import Chunk, StepAttention
from fabric.engine.flex import FlexAttention
from fabric.engine.fused import fuse
from fabric.engine.linear import pack_linears
from fabric.engine.lowrank import Factors
from fabric.engine.probe import observe_layers, observe_linears, run_largest
from fabric.engine.runner import Runner
from fabric.messages import Sampling
from fabric.testing.families import FAMILIES

GPU = "gpu"
NUM_BLOCKS = 8

ROWS = [
    Chunk(tokens=[3], start=4, blocks=[1], num_wanted=1),
    Chunk(tokens=[3, 4, 5], start=0, blocks=[2], num_wanted=1),
    Chunk(tokens=[3, 4, 5], start=5, blocks=[3], num_wanted=1),
]


def put(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the shape that the numbers have: torch keeps those of constants."""
    given = torch.tensor(values, dtype=dtype)
    return torch.empty(given.shape, dtype=given.dtype).to(device)


def move(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Put a model on the GPU."""
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None:
                module._parameters[name] = nn.Parameter(x.to(GPU, dtype), requires_grad=False)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype).to(GPU)
    return model


def run_steps(family: str, dtype: torch.dtype) -> Mapping[str, Callable[[], Tensor]]:
    """Return a family's steps by their names."""
    model = move(FAMILIES[family]().eval(), dtype)
    layers = observe_layers(model, name=family)
    linears = observe_linears(model)
    pack_linears(model, int8=family == "llama")
    fuse(model)
    gathered, flexible = (
        Runner(model, layers, num_blocks=NUM_BLOCKS, linears=linears, attention=kind, scratch=True)
        for kind in (StepAttention, FlexAttention)
    )

    def decode() -> Tensor:
        flexible.graph_decoding(max_rows=3, num_blocks=4, capture=lambda step: step)
        return flexible.forward(ROWS[:1])

    def adapt() -> Tensor:
        name, size = next(iter(gathered.lowrank.sizes.items()))
        down, up = torch.empty(2, size.num_inputs), torch.empty(size.num_outputs, 2)
        delta = gathered.lowrank.place({name: Factors(down_RK=down, up_OR=up)})
        [row] = ROWS[:1]
        changed = Chunk(
            tokens=row.tokens, start=row.start, blocks=row.blocks, num_wanted=1, deltas=(delta,)
        )
        return gathered.forward([changed, *ROWS[1:]])

    def sample() -> Tensor:
        logits_WV = gathered.forward(ROWS)
        asked = Sampling(logit_bias={5: 1.0}, repetition_penalty=1.2, frequency_penalty=0.5)
        allowed = np.ones(logits_WV.shape[1], dtype=bool)
        wanted = Adjustment(sampling=asked, prompt=[1, 2], generated=[3], allowed=allowed)
        adjusted_WV = adjustments.adjust(logits_WV, {1: wanted})
        draw = sampling.Draw(temperature=0.5, top_k=0, top_p=1.0, uniform=0.5, min_p=0.1)
        draws = [draw] * len(ROWS)
        return sampling._probable(sampling._weights(adjusted_WV, draws), draws)

    def largest() -> Tensor:
        run_largest(model, num_tokens=100, num_wanted=3)
        return gathered.forward_hidden(ROWS)[1]

    return {
        "gathered": lambda: gathered.forward(ROWS),
        "flex": lambda: flexible.forward(ROWS),
        "decoding": decode,
        "adapters": adapt,
        "sampling": sample,
        "largest": largest,
    }


def mix() -> Tensor:
    """Do what must fail: add the CPU's numbers to the GPU's."""
    return torch.empty(2, device=GPU) + torch.empty(2)


def read() -> Tensor:
    """Do what must fail: read a number back."""
    return torch.empty(int(torch.empty(2, device=GPU).max()))


def attempt(step: Callable[[], Tensor]) -> str:
    """Run a step; return what came of it."""
    try:
        result = step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"{result.device.type} {list(result.shape)}"


@contextmanager
def pretending() -> Iterator[None]:
    """Let there be the GPU, and no values, in this process."""
    _setup_privateuseone_for_python_backend(GPU)
    with ExitStack() as patches:
        for module in (adjustments, attention, cache, flex, graphs, runner, sampling):
            patches.enter_context(mock.patch.object(module, "put", put))
        for change in (
            # Its name is none that torch knows for flex attention, whose shapes are any device's.
            mock.patch.object(flex_attention, "_validate_device"),
            mock.patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
            mock.patch.object(flex, "_get_flex", return_value=flex_attention.flex_attention),
            FakeTensorMode(),
        ):
            patches.enter_context(change)
        yield


def main() -> None:
    """Run all steps."""
    told: dict[str, dict[str, str]] = {}
    with pretending():
        told["what must fail"] = {step.__name__: attempt(step) for step in (mix, read)}
        for family in FAMILIES:
            # torch groups experts' products in bfloat16 alone.
            experts = "moe" in family or "mixtral" in family
            steps = run_steps(family, torch.bfloat16 if experts else torch.float32)
            told[family] = {name: attempt(step) for name, step in steps.items()}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
