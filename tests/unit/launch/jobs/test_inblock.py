"""The process that a job runs, as a job of this machine: what it says, and how all of it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from fabric.config import SiteSpec
from fabric.launch.jobs import LaunchFolder, LaunchRecord, Order
from fabric.messages import InstanceState, InstanceStatus
from fabric.testing.hub import wait_until
from fabric.testing.instance import MODULE
from fabric.testing.rig import get_spec

PATIENCE_S = 60.0
RATES = {"shared_read_gb_s": 1.0, "local_read_gb_s": 4.0, "local_write_gb_s": 2.0}


class Job:
    """A job of a launch's folder, and what its instance last said."""

    def __init__(self, folder: LaunchFolder, process: subprocess.Popen[bytes], name: str) -> None:
        self.process = process
        self._folder, self._name = folder, name

    @property
    def status(self) -> InstanceStatus | None:
        return self._folder.status(self._name)

    @property
    def log(self) -> str:
        return self._folder.instance_log(self._name).read_text()

    def wait_for(self, state: InstanceState) -> None:
        def is_there() -> bool:
            return self.status is not None and self.status.state == state

        wait_until(is_there, timeout_s=PATIENCE_S)


@contextmanager
def running(
    root: Path, *, source: str = "", system: Mapping[str, Any] = {}, **order: object
) -> Iterator[Job]:
    """Run the job of a launch, whose instance has no hub."""
    facts = {"center": "Here", "scheduler": "local", "sources": ["a test"], "checked": "2026-11"}
    asked = {"model": "fixed@1", "machine": "here", "walltime": "00:30:00"}
    folder = LaunchFolder.create(root)
    record = LaunchRecord(
        name=folder.name,
        order=Order.model_validate(asked | order),
        site=SiteSpec.model_validate({"name": "here", "system": {**facts, **system}}),
        queue=None,
        hub_url="http://127.0.0.1:1",
        created_at=datetime.now(UTC),
    )
    folder.write_launch(record)
    spec = get_spec(folder.path / "jobs", model="fixed@1")
    if source:
        launch = spec.launch.model_copy(update={"source": source})
        spec = spec.model_copy(update={"launch": launch})
    name = spec.launch.instance
    command = [
        *(sys.executable, "-m", "fabric.launch.jobs.inblock", str(folder.write_spec(spec))),
        *(str(folder.instance_log(name)), "--walltime-s", "1800", "--warning-s", "10"),
        *("--module", MODULE),
    ]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PBS"))}
    with subprocess.Popen(command, env=environ) as process:
        try:
            yield Job(folder, process, name)
        finally:
            process.kill()


def test_a_job_drains_its_instance_when_it_is_told(tmp_path: Path) -> None:
    with running(tmp_path) as job:
        job.wait_for(InstanceState.READY)
        job.process.send_signal(signal.SIGUSR1)
        assert job.process.wait(PATIENCE_S) == 0
        assert job.status is not None
        assert job.status.state == InstanceState.STOPPED


def test_an_instance_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    with running(tmp_path) as job:
        job.wait_for(InstanceState.READY)
        (instance,) = psutil.Process(job.process.pid).children()
        instance.kill()
        assert job.process.wait(PATIENCE_S) != 0
        assert job.status is not None
        assert job.status.state == InstanceState.FAILED
        assert "ended by SIGKILL; most often there was no memory left" in job.status.detail


def test_bytes_are_told_while_weights_are_copied_and_a_signal_ends_that(tmp_path: Path) -> None:
    weights = tmp_path / "shared"
    weights.mkdir()
    with (weights / "model.safetensors").open("wb") as sparse:
        sparse.truncate(8 * 10**9)  # its digest takes seconds, and it takes no room
    storage = {"storage": RATES | {"local_dir": str(tmp_path)}}
    with running(tmp_path / "l", source=str(weights), system=storage, staging="always") as job:
        job.wait_for(InstanceState.LOADING)
        assert job.status is not None
        assert re.fullmatch(r"checking weights: \S+ of 8 GB", job.status.detail)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(PATIENCE_S) == 0
        assert job.status.state == InstanceState.STOPPED


def test_weights_that_are_missing_end_the_job_before_anything_is_started(tmp_path: Path) -> None:
    with running(tmp_path, source="/no/such/model") as job:
        assert job.process.wait(PATIENCE_S) == 1
        assert job.status is not None
        assert job.status.state == InstanceState.FAILED
        assert "'/no/such/model'" in job.status.detail
        assert job.log.strip() == job.status.detail


def test_a_launch_that_was_ended_leaves_its_job_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fabric.launch.jobs.inblock", str(tmp_path / "a/b.spec.json")]
    done = subprocess.run(
        [*command, str(tmp_path / "log"), "--walltime-s", "60", "--warning-s", "10"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "The launch was ended before its job started" in done.stderr
