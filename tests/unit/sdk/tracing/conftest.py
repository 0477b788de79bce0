"""A tiny random Llama: on an engine, under the oracle of programs, and bare, to compute by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fabric.engine.config import EngineConfig
from fabric.engine.local import local_engine
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import PointManifest, Program
from fabric.programs import check, read_constants, read_header
from fabric.sdk.arrays import write_tensors
from fabric.sdk.programs import ProgramResult, PromptToken, RunResult
from fabric.sdk.tracing import InProcess
from fabric.testing.families import SIZES
from fabric.testing.programs import Interpreter

torch.set_num_threads(1)

Model = LlamaForCausalLM
Change = Callable[[torch.Tensor], torch.Tensor]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 3}))).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bare(tiny_dir: Path) -> Model:
    """The model as transformers runs it."""
    return LlamaForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def engine(tiny_dir: Path) -> Iterator[TorchEngine]:
    config = EngineConfig(dtype="float32", num_threads=1, cache_bytes=8 * 2**20, max_rows=16)
    with local_engine(str(tiny_dir), config, name="tiny") as engine:
        yield engine


@pytest.fixture(scope="session")
def manifest(engine: TorchEngine) -> PointManifest:
    assert engine.info.points is not None
    return engine.info.points


class Oracle:
    """Runs programs with PyTorch hooks, one run at a time."""

    def __init__(self, model: Model, manifest: PointManifest) -> None:
        self._tokenizer = byte_tokenizer()
        self._interpreter = Interpreter(copy.deepcopy(model), self._tokenizer)
        self._manifest = manifest
        self.programs: list[Program] = []

    def points(self, model: str | None = None) -> PointManifest:
        return self._manifest

    def run_program(self, program: Program, **_: object) -> ProgramResult:
        data = read_constants(program)
        check(program, self._manifest, {} if data is None else read_header(data))
        self.programs.append(program)
        outcomes = self._interpreter.run(program)
        runs = tuple(
            RunResult(
                id=run.id,
                names=tuple(outcomes[run.id].saves),
                data=write_tensors(
                    {name: _array(x) for name, x in outcomes[run.id].saves.items()},
                    {
                        f"positions:{name}": json.dumps(where)
                        for name, where in outcomes[run.id].positions.items()
                    },
                ),
                tokens=tuple(outcomes[run.id].tokens),
                text=self._tokenizer.decode(outcomes[run.id].tokens),
            )
            for run in program.runs
        )
        return ProgramResult(runs=runs, model="tiny", digest=self._manifest.digest)

    def tokens(
        self, prompt: str | Sequence[int], *, model: str | None = None
    ) -> tuple[PromptToken, ...]:
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return tuple(PromptToken(id=int(i), text=self._tokenizer.decode([int(i)])) for i in ids)


def _array(x: torch.Tensor) -> np.ndarray:
    wide = x if x.dtype in (torch.int64, torch.bool) else x.float()
    return wide.detach().numpy()


@pytest.fixture(scope="session")
def oracle(bare: Model, manifest: PointManifest) -> Oracle:
    return Oracle(bare, manifest)


@pytest.fixture(params=["engine", "oracle"])
def backend(request: pytest.FixtureRequest, engine: TorchEngine, oracle: Oracle) -> object:
    """What runs programs: the engine in this process, and the oracle."""
    return InProcess(engine) if request.param == "engine" else oracle


@contextmanager
def changed(model: Model, changes: dict[str, Change]) -> Iterator[None]:
    """Within this block the outputs of these modules are changed."""

    def hook(change: Change) -> Callable[..., object]:
        def after(module: object, args: object, output: object) -> object:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return after

    with ExitStack() as stack:
        for name, change in changes.items():
            handle = model.get_submodule(name).register_forward_hook(hook(change))
            stack.callback(handle.remove)
        yield


@pytest.fixture(scope="session")
def by_hand(bare: Model) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Run the bare model on a text or ids: its logits [T, V], and the outputs of some modules."""

    def run(
        prompt: str | Sequence[int],
        changes: dict[str, Change] | None = None,
        keep: Sequence[str] = (),
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ids = byte_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        kept: dict[str, torch.Tensor] = {}

        def keeping(name: str, change: Change) -> Change:
            def both(output: torch.Tensor) -> torch.Tensor:
                made = change(output)
                kept[name] = made[0].detach().clone()
                return made

            return both

        hooks: dict[str, Change] = dict(changes or {})
        for name in keep:
            hooks[name] = keeping(name, hooks.get(name, lambda output: output))
        with changed(bare, hooks), torch.no_grad():
            return bare(torch.tensor([ids])).logits[0], kept

    return run
