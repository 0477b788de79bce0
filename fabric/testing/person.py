"""Somebody who launches instances on a machine of a test, by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from fabric.launch.jobs import JobRecord, LaunchFolder
from fabric.sdk import Fabric
from fabric.testing.commands import get_environ
from fabric.testing.hub import PROJECT, RunningHub
from fabric.testing.instance import MODULE

PATIENCE_S = 240.0


class Person:
    """Somebody with a key that may launch.

    Args:
        hub: Where instances join.
        folder: Where the person's files are.
        machine: The site where they launch; they have no file of it yet.
        **environ: Further variables of their commands.
    """

    def __init__(self, hub: RunningHub, folder: Path, machine: str, **environ: str) -> None:
        _, self.key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
        self.hub = hub
        self.machine = machine
        self.state = folder / "s"
        self.launches = self.state / "launches"
        self.sites = folder / "config" / "fabric" / "sites"
        self.sites.mkdir(parents=True)
        own = {"FABRIC_API_KEY": self.key, "FABRIC_STATE_DIR": str(self.state)}
        self.environ = get_environ(folder, hub, **own | environ)
        self.fabric = Fabric(hub.base_url, self.key)

    def know(self, site: Mapping[str, Any]) -> None:
        """Write the file of the machine."""
        text = yaml.safe_dump({**site, "name": self.machine})
        (self.sites / f"{self.machine}.yaml").write_text(text)

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

    def try_launch(
        self,
        *args: str,
        model: str = "brought@1",
        walltime: str = "00:05:00",
        module: str = MODULE,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``fabric launch``, whatever comes of it."""
        fixed = ("--site", self.machine, "--walltime", walltime, "--module", module)
        return self.run("launch", model, *fixed, "--format", "json", *args)

    def launch(self, *args: str, **options: str) -> dict[str, Any]:
        """Run ``fabric launch``, which must succeed; return what it says of the launch."""
        done = self.try_launch(*args, **options)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def wait_job(self, name: str, condition: Callable[[JobRecord], bool]) -> JobRecord:
        """Return what is on disk of a launch's first job once a condition holds."""
        folder, until = LaunchFolder(self.launches / name), time.monotonic() + PATIENCE_S
        while not ((jobs := folder.jobs()) and condition(jobs[0])):
            assert time.monotonic() < until, (jobs, folder.log_path.read_text())
            time.sleep(0.2)
        return jobs[0]

    def end_all(self) -> None:
        """End the launchers."""
        self.fabric.close()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if "fabric.cli.launching" in words and str(self.state) in list(words)[-1]:
                process.kill()
