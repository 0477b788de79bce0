"""Engines of one process whose steps take turns, so that a difference of a percent can be seen.

Each side is an engine's decoding. After a few steps it waits until every other side has made as
many, and only one computes at a time: whatever slows the machine down slows adjacent turns of all.
Sides change engines from round to round, because where an engine's memory lies is worth a
percent. Steps are measured in CPU seconds of their engine's thread.
"""

from __future__ import annotations

import base64
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import (
    EMBED_SAMPLING,
    Event,
    Failed,
    Failure,
    Finished,
    Program,
    ProgramInput,
    Request,
    Saves,
    Task,
    Token,
)

Json = dict[str, object]
STEPS_A_TURN = 4
"""The median of all but the first is what counts: that one finds the caches full of another's."""


class Heard:
    """A sink: what was saved, and how it ended."""

    def __init__(self) -> None:
        self.saves: dict[str, bytes] = {}
        self._failure: Failure | None = None
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Saves) and event.data:
            self.saves[event.run] = base64.b64decode(event.data)
        elif isinstance(event, Failed):
            self._failure = event.failure
        if isinstance(event, Failed | Finished):
            self._ended.set()

    def wait(self) -> None:
        """Return when it has ended; a failure ends the benchmark, and says why."""
        self._ended.wait()
        if self._failure is not None:
            raise SystemExit(f"{self._failure.code}: {self._failure.message}")


class Ours:
    """The engine, asked as an instance asks it."""

    def __init__(self, source: ModelSource, **config: object) -> None:
        values = {"num_threads": 1, "max_rows": 64, "speculation": "off"} | config
        self.engine = TorchEngine(source, EngineConfig(**values), name="model")  # type: ignore[arg-type]
        self.engine.start()

    def submit(self, asked: Program | Request, sink: Callable[[Event], None]) -> None:
        request = asked if isinstance(asked, Request) else request_of(asked)
        digest = self.engine.info.digest
        task = Task(id=request.id, attempt=1, request=request, digest=digest, deadline_s=3600.0)
        self.engine.submit(task, sink)


def request_of(program: Program) -> Request:
    return Request(
        mode="program",
        model="model",
        input=ProgramInput(program=program),
        sampling=EMBED_SAMPLING,
        tier="batch",
    )


class Ring:
    """Says whose turn it is among the sides that have not ended."""

    def __init__(self, num: int) -> None:
        self._changed = threading.Condition()
        self._order = list(range(num))

    def next(self, side: int) -> None:
        """Let the others go first, one after the other; return when it is the side's turn."""
        with self._changed:
            if self._order[0] == side:
                self._order.append(self._order.pop(0))
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._order[0] == side)

    def leave(self, side: int) -> None:
        with self._changed:
            if side in self._order:
                self._order.remove(side)
            self._changed.notify_all()


class Turns(Heard):
    """A sink whose engine waits for its turn after some steps.

    Args:
        ring: Of all sides.
        side: Its number there.
        num_rows: Of the step: its last row's token ends it.
        enter: Called when it gets its turn.
    """

    def __init__(self, ring: Ring, side: int, num_rows: int, enter: Callable[[], None]) -> None:
        super().__init__()
        self.steps_s: list[float] = []
        self._turn_s: list[float] = []
        self._ring, self._side, self._last, self._enter = ring, side, num_rows - 1, enter
        self._begun_s: float | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token) and event.choice == self._last:
            if self._begun_s is not None:
                self._turn_s.append(time.thread_time() - self._begun_s)
            if self._begun_s is None or len(self._turn_s) == STEPS_A_TURN:
                self._take_turn()
            self._begun_s = time.thread_time()
        elif isinstance(event, Failed | Finished):
            self._ring.leave(self._side)
        super().__call__(event)

    def _take_turn(self) -> None:
        if self._turn_s:
            self.steps_s.append(statistics.median(self._turn_s[1:]))
            self._turn_s.clear()
        self._ring.next(self._side)
        self._enter()


class Side:
    """What an engine is asked in each round.

    Args:
        ask: Makes the request, or program, of a round.
        num_rows: It decodes.
        enter: Called before each of its turns.
    """

    def __init__(
        self,
        ask: Callable[[], Program | Request],
        num_rows: int,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        self.ask, self.num_rows, self.enter = ask, num_rows, enter


def in_turns(
    engines: Sequence[Ours],
    sides: Mapping[str, Side],
    rounds: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Return, by side and round, the seconds of a step in each turn; ``between`` ends a round."""
    seen: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(rounds):
        ring = Ring(len(sides))
        sinks = {
            name: Turns(ring, i, side.num_rows, side.enter)
            for i, (name, side) in enumerate(sides.items())
        }
        for i, (name, side) in enumerate(sides.items()):
            engines[(i + number) % len(sides)].submit(side.ask(), sinks[name])
        for name, sink in sinks.items():
            sink.wait()
            seen[name].append(sink.steps_s[1:])  # in the first turn plans are made
        between()
    return seen


def differences_ms(seen: Mapping[str, list[list[float]]], side: str, plain: str) -> Json:
    """Milliseconds a step of one side takes over the step of the other beside it."""
    return _told(seen, side, plain, lambda a, b: (a - b) * 1e3)


def ratios(seen: Mapping[str, list[list[float]]], side: str, plain: str) -> Json:
    """A step of one side over the step of the other beside it."""
    return _told(seen, side, plain, lambda a, b: a / b)


def _told(
    seen: Mapping[str, list[list[float]]],
    side: str,
    plain: str,
    compare: Callable[[float, float], float],
) -> Json:
    """Median over all pairs of turns; where it lies in 95 of 100 draws of as many rounds."""
    rounds = [
        [compare(a, b) for a, b in zip(*pair, strict=True)]
        for pair in zip(seen[side], seen[plain], strict=True)
    ]
    draw = random.Random(0)
    medians = sorted(
        statistics.median([x for some in draw.choices(rounds, k=len(rounds)) for x in some])
        for _ in range(400)
    )
    return {
        "median": round(statistics.median([x for some in rounds for x in some]), 4),
        "95% from": round(medians[10], 4),
        "95% to": round(medians[-11], 4),
        "pairs of turns": sum(map(len, rounds)),
    }
