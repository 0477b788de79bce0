"""Engines over every family's tiny model, programs for them, and the oracle beside them."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import EMBED_SAMPLING, Program, ProgramInput, Request, Saves, Task, Token
from fabric.testing.families import FAMILIES
from fabric.testing.programs import Interpreter, RunOutcome

PROMPT = [5, 6, 7, 8, 9, 10, 11]


@dataclass
class Outcome:
    """What an engine answered to a program, by run."""

    events: list
    saves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    streamed: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)
    positions: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def end(self):
        return self.events[-1]

    @property
    def error(self) -> str:
        assert self.end.type == "failed", self.end
        return self.end.failure.code


class Rig:
    """An engine over one model, the oracle over a copy of it."""

    def __init__(self, engine, model, heard: Callable) -> None:
        self.engine = engine
        self.model = model
        self._heard = heard

    @property
    def manifest(self):
        return self.engine.info.points

    def points(self, *, write: bool = False) -> list[str]:
        """The points that can be read (or written too), in order."""
        from fabric.programs import order_of

        names = [
            spec.pattern.replace("{i}", str(layer))
            for spec in self.manifest.points
            if (spec.write if write else spec.read)
            for layer in (spec.layers or (0,))
        ]
        return sorted(names, key=lambda name: order_of(self.manifest, name))

    def send(self, program: Program, *, salt: str = "", tier: str = "standard", on_event=None):
        """Submit a program; return its sink."""
        request = Request(
            mode="program",
            model="tiny",
            input=ProgramInput(program=program),
            sampling=EMBED_SAMPLING,
            tier=tier,
        )
        task = Task(
            id=request.id,
            attempt=1,
            request=request,
            digest=self.engine.info.digest,
            deadline_s=120.0,
            cache_salt=salt,
        )
        self.last_task = task
        heard = self._heard(on_event)
        self.engine.submit(task, heard)
        return heard

    def run(self, program: Program, **how) -> Outcome:
        """Run a program to its end."""
        return outcome_of(self.send(program, **how))

    def expect(self, program: Program, constants=None) -> dict[str, RunOutcome]:
        """What the oracle makes of it."""
        return Interpreter(copy.deepcopy(self.model)).run(program, constants)


def outcome_of(heard) -> Outcome:
    outcome = Outcome(heard.wait().events)
    for event in heard.events:
        if isinstance(event, Token):
            outcome.tokens.setdefault(event.choice, []).append(event.token_id)
        if isinstance(event, Saves) and event.data is not None:
            data = base64.b64decode(event.data)
            if event.step is not None:
                outcome.streamed[event.run, event.step] = load(data)
                continue
            outcome.saves[event.run] = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            outcome.positions[event.run] = {
                name.removeprefix("positions:"): json.loads(at)
                for name, at in header.get("__metadata__", {}).items()
            }
    return outcome


def make_program(
    *runs: dict, constants: Mapping[str, Tensor] | None = None, **limits: float
) -> Program:
    """A program of these runs; each has the prompt unless it brings its own."""
    data = {"runs": [{"id": f"r{i}", "ids": PROMPT, **run} for i, run in enumerate(runs)]}
    if constants:
        packed = save(dict(constants))
        data["consts"] = {
            "sha256": hashlib.sha256(packed).hexdigest(),
            "size": len(packed),
            "data": base64.b64encode(packed).decode(),
        }
    if limits:
        data["limits"] = limits
    return Program.model_validate_json(json.dumps(data))


@pytest.fixture(scope="session")
def program_of() -> Callable[..., Program]:
    """Make a program of runs given as JSON, and of constants."""
    return make_program


@pytest.fixture(scope="session")
def outcome() -> Callable[..., Outcome]:
    """Wait for a program that was sent."""
    return outcome_of


@pytest.fixture(scope="session")
def rig_of(save_model, heard) -> Iterator[Callable[..., Rig]]:
    """Start engines over families' tiny models, one for each choice of options."""
    rigs: dict[object, Rig] = {}

    def start(family: str = "llama", model=None, fresh: object = None, **config) -> Rig:
        key = (family, id(model), fresh, *sorted(config.items()))
        if key not in rigs:
            torch.manual_seed(3)
            model = model or FAMILIES[family]().eval()
            values = {
                "dtype": "float32",
                "num_threads": 1,
                "cache_bytes": 4 * 2**20,
                "max_rows": 16,
                "step_tokens": 40,
            }
            keep = config.pop("keep", None)
            engine = TorchEngine(
                ModelSource.parse(str(save_model(model))),
                EngineConfig(**(values | config)),
                name="tiny",
                keep=keep,
            )
            engine.start()
            rigs[key] = Rig(engine, model, heard)
        return rigs[key]

    yield start
    for rig in rigs.values():
        rig.engine.close()


@pytest.fixture(scope="session")
def header_of() -> Callable[[bytes], dict]:
    """Read the metadata of a safetensors file."""
    return lambda path: safe_open(path, "pt").metadata()
