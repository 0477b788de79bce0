"""How long jobs have waited and models have loaded, on this user's machines."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Self

from pydantic import ValidationError

from fabric.launch.forecast import WaitEstimator, WaitForecast
from fabric.launch.jobs.order import Order
from fabric.launch.jobs.records import JobRecord
from fabric.messages.wire import Wire

READ_BYTES_S = 1e9
"""What a shared file system gives one reader, where nothing has been measured."""

START_S = 20.0
"""Until a process has started and reads weights, where nothing has been measured."""

_REMEMBERED = 9


class Passed(Wire):
    """A job that has become ready: how long it waited for nodes and loaded, in seconds."""

    machine: str
    queue: str
    nodes: int
    walltime_s: float
    model: str
    wait_s: float
    load_s: float


class History:
    """A file of lines, one a job that became ready.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def under(cls, launches: Path) -> Self:
        """Return the history of the launches that are kept in a folder."""
        return cls(launches / "history.jsonl")

    def add(self, passed: Passed) -> None:
        """Remember a job."""
        with self._path.open("a") as file:
            file.write(passed.model_dump_json() + "\n")

    def remember(self, order: Order, queue: str | None, job: JobRecord) -> None:
        """Remember a job of an order whose instance has become ready."""
        assert job.started_at is not None
        assert job.ready_at is not None
        self.add(
            Passed(
                machine=order.machine,
                queue=queue or "",
                nodes=order.nodes,
                walltime_s=order.walltime_s,
                model=order.model,
                wait_s=max(0.0, (job.started_at - job.submitted_at).total_seconds()),
                load_s=max(0.0, (job.ready_at - job.started_at).total_seconds()),
            )
        )

    def forecast_wait(
        self, machine: str, queue: str, *, nodes: int, walltime_s: float, hint_s: float | None
    ) -> WaitForecast:
        """Return how long a job would wait; ``hint_s`` is what the scheduler says of it."""
        estimator = WaitEstimator()
        for one in self._read():
            if one.machine == machine:
                estimator.record(
                    one.queue, nodes=one.nodes, walltime_s=one.walltime_s, wait_s=one.wait_s
                )
        return estimator.forecast(queue, nodes=nodes, walltime_s=walltime_s, hint_s=hint_s)

    def predict_load_s(self, machine: str, model: str, weight_bytes: int | None) -> float:
        """Return how long a model should take from its job's start until it is ready."""
        seen = [x.load_s for x in self._read() if (x.machine, x.model) == (machine, model)]
        if seen:
            return median(seen[-_REMEMBERED:])
        return START_S + (weight_bytes or 0) / READ_BYTES_S

    def _read(self) -> list[Passed]:
        try:
            lines = self._path.read_text().splitlines()
        except OSError:
            return []
        passed = []
        for line in lines:
            try:
                passed.append(Passed.model_validate_json(line))
            except ValidationError:
                continue  # a line that was being written when its writer was killed
        return passed
