"""What the figures of a ``Load`` are called in metrics, at an instance and at the hub alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from fabric.messages.session import Load

Kind = Literal["gauge", "counter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One metric; those of a ``phase`` of steps share their name."""

    name: str
    text: str
    kind: Kind
    read: Callable[[Load], float]
    phase: str | None = None


_PHASES: dict[str, Callable[[Load], tuple[int, float]]] = {
    "prefill": lambda load: (load.prefill_steps.num, load.prefill_steps.seconds),
    "decode": lambda load: (load.decode_steps.num, load.decode_steps.seconds),
    "mixed": lambda load: (load.mixed_steps.num, load.mixed_steps.seconds),
}


def _of_phase(at: int) -> Iterator[tuple[str, Callable[[Load], float]]]:
    for phase, both in _PHASES.items():
        yield phase, lambda load, both=both: both(load)[at]  # type: ignore[misc]


_LEVELS: tuple[Figure, ...] = (
    Figure(
        name="vllm:num_requests_running",
        text="Choices in the batch.",
        kind="gauge",
        read=lambda load: load.num_running,
    ),
    Figure(
        name="vllm:num_requests_waiting",
        text="Choices that wait.",
        kind="gauge",
        read=lambda load: load.num_waiting,
    ),
    Figure(
        name="vllm:kv_cache_usage_perc",
        text="Share of the KV cache in use.",
        kind="gauge",
        read=lambda load: load.cache_usage,
    ),
)
COUNTS: tuple[Figure, ...] = (
    Figure(
        name="vllm:num_preemptions",
        text="Tasks that gave their cache up and were computed again.",
        kind="counter",
        read=lambda load: load.num_preempted,
    ),
    Figure(
        name="fabric_engine_busy_seconds",
        text="Seconds of all steps.",
        kind="counter",
        read=lambda load: load.busy_s,
    ),
    *(
        Figure(
            name="fabric_engine_steps",
            text="Steps, by what they ran.",
            kind="counter",
            read=read,
            phase=phase,
        )
        for phase, read in _of_phase(0)
    ),
    *(
        Figure(
            name="fabric_engine_step_seconds",
            text="Seconds of steps, by what they ran.",
            kind="counter",
            read=read,
            phase=phase,
        )
        for phase, read in _of_phase(1)
    ),
)
"""Counters of an instance since its start."""

ALL: tuple[Figure, ...] = (*_LEVELS, *COUNTS)


def by_name(figures: Sequence[Figure]) -> Iterator[tuple[Figure, list[Figure]]]:
    """Yield the figures of each name with the first of them."""
    for _, same in groupby(figures, key=lambda figure: figure.name):
        group = list(same)
        yield group[0], group
