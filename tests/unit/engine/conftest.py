"""A tiny random Llama with a byte tokenizer, an engine over it, and a sink that collects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fabric.engine import attention, fused, linear, opening
from fabric.engine.config import EngineConfig
from fabric.engine.interface import Engine, FetchAdapter
from fabric.engine.model import LoadedModel, load_model
from fabric.engine.native import Native, load_native
from fabric.engine.partition.crew import Crew
from fabric.engine.source import ModelSource
from fabric.engine.text import Texts
from fabric.engine.torch_engine import TorchEngine
from fabric.testing.asking import Asker, Heard
from fabric.testing.tiny_model import byte_tokenizer, save, save_tiny_llama, tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def reference(tiny_dir: Path) -> PreTrainedModel:
    """The same model, run by transformers."""
    return LlamaForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Native | None:
    """Run on the compiled kernels, or as where there is no compiler."""
    found = load_native()
    assert found is not None
    if request.param == "native":
        return found
    for module in (attention, fused, linear):
        monkeypatch.setattr(module, "load_native", lambda: None)
    return None


class Driver(Asker):
    """An engine that is asked, and what it runs."""

    usual: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, engine: Engine, model: PreTrainedModel | None = None) -> None:
        super().__init__(engine)
        self.model = model
        limits = engine.info.limits
        self.texts = Texts(byte_tokenizer(), vocabulary=259, context_tokens=limits.context_tokens)

    def greedy(self, prompt: str | list[int], max_tokens: int = 12, **more: object) -> Heard:
        return self.ask(prompt, temperature=0.0, max_tokens=max_tokens, **more)


@pytest.fixture(scope="package")
def crew() -> Iterator[Crew]:
    """Three ranks beside this process, for all models that are divided.

    It ends with the tests of the engine: torch's agent draws from the global ``random`` all the
    while, which hypothesis takes for a strategy that cannot be repeated.
    """
    crew = Crew(num_ranks=4, num_threads=1, timeout_s=240.0)
    crew.start()
    yield crew
    crew.close()


@pytest.fixture(scope="module")
def drive(tiny_dir: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Driver]]:
    """Start engines over the tiny model (or another directory) and close them at the end.

    Divided ones share the crew, so a new one closes the one before.
    """
    engines = []
    divided: list[TorchEngine] = []

    def start(
        path: Path = tiny_dir, fetch_adapter: FetchAdapter | None = None, **config: object
    ) -> Driver:
        values: dict[str, object] = {
            "dtype": "float32",
            "num_threads": 1,
            "cache_bytes": 4 * 2**20,
            "max_rows": 16,
            "step_tokens": 40,
        }
        configured = EngineConfig(**(values | config))  # type: ignore[arg-type]
        crew = None
        if configured.num_ranks > 1:
            for other in divided:
                other.close()
            crew = request.getfixturevalue("crew")
        engine = TorchEngine(
            ModelSource.parse(str(path)),
            configured,
            name="tiny",
            fetch_adapter=fetch_adapter,
            crew=crew,
        )
        if crew is not None:
            divided[:] = [engine]
        loaded = []

        def load_and_keep(*args: object, **kwargs: object) -> LoadedModel:
            loaded.append(load_model(*args, **kwargs))  # type: ignore[arg-type]
            return loaded[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opening, "load_model", load_and_keep)
            engine.start()
        engines.append(engine)
        return Driver(engine, loaded[0].model if loaded else None)

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def driver_of() -> Callable[[Engine], Driver]:
    """Drive an engine that has been started."""
    return Driver


@pytest.fixture(scope="module")
def tiny(drive: Callable[..., Driver]) -> Driver:
    return drive()


@pytest.fixture(scope="session")
def byte_tokens() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def heard() -> Callable[..., Heard]:
    """Make a sink that reacts to events."""
    return lambda on_event=None: Heard(on_event=on_event)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedModel], Path]:
    """Write a model with the byte tokenizer to a directory of its own."""
    return lambda model: save(model, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Make a tiny Llama with a changed configuration."""

    def make(**changes: object) -> LlamaForCausalLM:
        torch.manual_seed(7)
        return LlamaForCausalLM(tiny_config(**changes))

    return make


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Poll a condition; fail when it stays false."""

    def wait(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
        pause = threading.Event()
        for _ in range(int(deadline_s / 0.005)):
            if condition():
                return
            pause.wait(0.005)
        pytest.fail("the condition stayed false")

    return wait
