"""Somebody who launches instances from the login node of a test's Slurm, by the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric.cli import launches
from fabric.launch.jobs import LaunchFolder
from fabric.testing.hub import RunningHub
from fabric.testing.person import PATIENCE_S, Person
from fabric.testing.slurm.rig import Slurm

MACHINE = "test-slurm"
SYSTEM: dict[str, Any] = {
    "center": "Here",
    "scheduler": "slurm",
    "nodes": {"cpu": {"count": 2, "cores": 2, "memory_gb": 4, "devices": 0}},
    "queues": {
        "debug": {
            "kind": "partition",
            "nodes": "cpu",
            "default": True,
            "max_nodes": 2,
            "max_walltime": "01:00:00",
            "units_per_node_hour": 2.0,
        },
        "small": {"kind": "partition", "nodes": "cpu", "max_walltime": "00:05:00"},
    },
    "charge": {"unit": "node-hour"},
    "sources": ["the test"],
    "checked": "2026-11",
}
ENDPOINT = {"scheduler": "slurm", "walltime": "00:10:00", "exclusive": False}


class User(Person):
    """Somebody with a key that may launch, at the cluster's login node.

    Args:
        hub: Where instances join.
        slurm: The cluster.
        folder: Where the user's files are.
        hub_url: How the user reaches the hub, if not at its own address.
        system: What the machine's file says beside ``SYSTEM``.
        endpoint: What it says of jobs beside their usual walltime.
        models: The models that it names.
    """

    def __init__(
        self,
        hub: RunningHub,
        slurm: Slurm,
        folder: Path,
        *,
        hub_url: str | None = None,
        system: Mapping[str, Any] = {},
        endpoint: Mapping[str, Any] = {},
        models: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        own = {"FABRIC_BASE_URL": hub_url or hub.base_url, "COLUMNS": "120"}
        super().__init__(hub, folder, MACHINE, **slurm.environ, **own)
        self.slurm = slurm
        self.know(
            {
                "title": "A Slurm of the tests' own",
                "system": {**SYSTEM, **system},
                "models": list(models),
                "endpoint": {**ENDPOINT, **endpoint},
            }
        )

    def shown(self, name: str) -> dict[str, Any]:
        """Return what ``fabric instances`` says of a launch, without a process for each look."""
        return launches.describe(LaunchFolder(self.launches / name))

    def wait(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return what is said of a launch once a condition holds."""
        until = time.monotonic() + PATIENCE_S
        while not condition(launch := self.shown(name)):
            assert time.monotonic() < until, launch
            time.sleep(0.3)
        return launch

    def log_of(self, job: Mapping[str, Any]) -> str:
        """Return what a job and its instance wrote, if anything."""
        logs = self.state.glob(f"launches/*/jobs/{job['instance']}.log")
        return "".join(path.read_text(errors="replace") for path in logs)

    def end_all(self) -> None:
        """End the user's launchers and all jobs of the cluster."""
        super().end_all()
        for job in self.slurm.run("squeue", "-h", "-o", "%i").split():
            self.slurm.try_run("scancel", job)


def states(launch: Mapping[str, Any]) -> list[str]:
    """Return the states of a launch's jobs, oldest first."""
    return [job["state"] for job in launch["jobs"]]
