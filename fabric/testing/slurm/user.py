"""Somebody who launches instances from the login node of a test's Slurm, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from fabric.sdk import Fabric
from fabric.testing.hub import PROJECT, RunningHub
from fabric.testing.instance import MODULE
from fabric.testing.slurm.rig import Slurm

PATIENCE_S = 240.0
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


class User:
    """Somebody with a key that may launch, at the cluster's login node.

    Args:
        hub: Where instances join.
        slurm: The cluster.
        folder: Where the user's files are.
        hub_url: How the user reaches the hub, if not at its own address.
        system: What the machine's file says beside ``SYSTEM``.
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
        models: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        _, self.key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
        self.slurm = slurm
        self.hub = hub
        self.state = folder / "s"
        sites = folder / "config" / "fabric" / "sites"
        sites.mkdir(parents=True)
        site = {
            "name": MACHINE,
            "title": "A Slurm of the tests' own",
            "system": {**SYSTEM, **system},
            "models": list(models),
            "endpoint": {"scheduler": "slurm", "walltime": "00:10:00", "exclusive": False},
        }
        (sites / f"{MACHINE}.yaml").write_text(yaml.safe_dump(site))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FABRIC_")}
        self.environ = kept | {
            **slurm.environ,
            "FABRIC_BASE_URL": hub_url or hub.base_url,
            "FABRIC_API_KEY": self.key,
            "FABRIC_STATE_DIR": str(self.state),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "COLUMNS": "120",
        }
        self.fabric = Fabric(hub.base_url, self.key)

    def run(self, *args: str, environ: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        """Run ``fabric`` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "fabric.cli", *args],
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S + 30,
            check=False,
        )

    def launch(
        self, *args: str, model: str, walltime: str = "00:05:00", module: str = MODULE
    ) -> dict[str, Any]:
        """Run ``fabric launch``, which must succeed; return what it says of the launch."""
        done = self.run(
            *("launch", model, "--site", MACHINE, "--walltime", walltime),
            *("--format", "json", "--module", module, *args),
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def shown(self, name: str) -> dict[str, Any]:
        """Return what ``fabric instances`` says of a launch."""
        done = self.run("instances", name, "--format", "json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)[0])

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
        self.fabric.close()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if "fabric.cli.launching" in words and str(self.state) in list(words)[-1]:
                process.kill()
        for job in self.slurm.run("squeue", "-h", "-o", "%i").split():
            self.slurm.try_run("scancel", job)


def states(launch: Mapping[str, Any]) -> list[str]:
    """Return the states of a launch's jobs, oldest first."""
    return [job["state"] for job in launch["jobs"]]
