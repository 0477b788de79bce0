"""A run directory as on site, with workers that run the shipped functions from their source."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parsl  # noqa: F401 - here, where no collection can break its imports (tests/conftest.py)
import pytest

from fabric.compute.functions import shipped_functions
from fabric.messages import InstanceSpec
from fabric.testing.instance import MODULE

READY_S = 60.0

WORKER = """
import json, sys
name, source, arguments = json.loads(sys.stdin.readline())
namespace = {}
exec(source, namespace)
print(json.dumps(namespace[name](*arguments)), flush=True)
"""


class Site:
    """A run directory; ``call`` runs a function as a worker does: its source, in no module."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir: object = str(run_dir)
        self.instances = run_dir / "instances"
        self._pool = ThreadPoolExecutor(max_workers=8)
        self._started: list[str] = []

    def call(self, name: str, *arguments: object) -> Any:
        source = shipped_functions()[name].source
        namespace: dict[str, Callable[..., object]] = {}
        exec(source, namespace)  # type: ignore[arg-type]
        return namespace[name](*arguments, self.run_dir)

    def start(self, spec: InstanceSpec) -> Future[Any]:
        """Start an instance; the future is what ``start_instance`` returns."""
        self._started.append(spec.launch.instance)
        return self._pool.submit(self.call, "start_instance", to_json(spec))

    def wait_ready(self, instance: str, *, timeout_s: float = READY_S) -> dict[str, Any]:
        """Return how the site describes an instance once it is ready."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for one in self.call("describe_site")["instances"]:
                if one["instance"] == instance and one["state"] == "ready":
                    return dict(one)
            time.sleep(0.05)
        raise TimeoutError(f"{instance} is not ready")

    def start_ready(self, spec: InstanceSpec) -> dict[str, Any]:
        self.start(spec)
        return self.wait_ready(spec.launch.instance)

    @contextmanager
    def worker(self, name: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """Run a function in a worker process of its own, which is killed at the end."""
        call = [name, shipped_functions()[name].source, [*arguments, self.run_dir]]
        with subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
            try:
                yield process
            finally:
                process.kill()

    def close(self) -> None:
        for instance in self._started:
            self.call("stop_instance", instance)
        self._pool.shutdown()


def to_json(spec: InstanceSpec) -> dict[str, Any]:
    """Return a spec as an agent sends it."""
    return spec.model_dump(mode="json", exclude={"status_path"})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("FABRIC_INSTANCE_MODULE", MODULE)
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "GC_TASK_UUID"):
        monkeypatch.delenv(name, raising=False)
    site = Site(tmp_path / "run")
    yield site
    site.close()
