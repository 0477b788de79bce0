"""``fabric-admin doctor`` on a login node: a real Slurm, and a Globus Compute that answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fabric.cli.doctor import SchedulerCheck, examine
from fabric.config import EndpointSpec
from fabric.testing.commands import get_environ
from fabric.testing.globus import Globus
from fabric.testing.slurm import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_partitions_and_walltimes_that_slurm_refuses_are_told(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    spec = EndpointSpec.model_validate(
        {
            "scheduler": "slurm",
            "partition": "debug",
            "walltime": "00:04:00",
            "choices": {"partition": ["small", "gpu"]},
        }
    )
    debug, small, gpu = examine([SchedulerCheck(endpoint=spec)])
    assert [debug.level, small.level, gpu.level] == ["ok", "ok", "wrong"]
    assert "partition gpu" in gpu.detail
    assert "invalid partition" in gpu.detail
    assert "sinfo" in gpu.remedy
    long = spec.model_copy(update={"walltime": "00:30:00"})
    debug, small, _ = examine([SchedulerCheck(endpoint=long)])
    assert [debug.level, small.level] == ["ok", "wrong"]
    assert "5 minutes at most" in small.detail


def test_an_endpoint_that_nobody_knows_is_told(globus: Globus, tmp_path: Path) -> None:
    site = {
        "name": "anvil",
        "executor": {"kind": "globus-compute", "endpoint_id": str(uuid4())},
        "endpoint": {"scheduler": "local"},
    }
    (tmp_path / "anvil.yaml").write_text(json.dumps(site))
    environ = get_environ(tmp_path, **globus.environ("site-a"), XDG_CONFIG_HOME=str(tmp_path))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fabric.cli.admin", "doctor", "anvil.yaml"),
            *("--hub", globus.url, "--format", "json"),
        ],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    levels = {one["check"]: one["level"] for one in findings}
    # The hub here is the service, which is no hub.
    assert levels["hub"] == "wrong"
    assert levels["globus compute"] == "ok"
    assert levels["endpoint"] == "wrong"
    (endpoint,) = (one for one in findings if one["check"] == "endpoint")
    assert "fabric-admin endpoint install" in endpoint["remedy"]
