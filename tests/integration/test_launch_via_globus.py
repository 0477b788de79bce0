"""Launches from elsewhere: through the user's Globus Compute endpoint at the login node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import yaml

from fabric.compute.endpoint import get_endpoint_files
from fabric.config import SiteSpec, load_site, shipped_sites
from fabric.launch.jobs import JobRecord, LaunchFolder
from fabric.launch.jobs.through import FUNCTIONS, LIMITS, EndpointLogin, get_budget_path
from fabric.sdk import Fabric
from fabric.testing.compute import get_rig_pool
from fabric.testing.globus import Endpoint, Globus
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import Slurm, running_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OWNER = "alice"
MACHINE = "far"
PATIENCE_S = 200.0


class User:
    """Somebody with a key and a Globus login, on a machine that knows no scheduler."""

    def __init__(self, globus: Globus, hub: RunningHub, folder: Path) -> None:
        self.state, self.sites = folder / "s", folder / "config" / "fabric" / "sites"
        self.launches = self.state / "launches"
        self.launches.mkdir(parents=True)
        self.sites.mkdir(parents=True)
        _, key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FABRIC_", "SLURM"))}
        self.environ = kept | {
            **globus.environ(OWNER),
            # None of Slurm's commands are here.
            "PATH": str(Path(sys.executable).parent),
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": key,
            "FABRIC_STATE_DIR": str(self.state),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        self.fabric = Fabric(hub.base_url, key)

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fabric.cli", *args],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S + 60,
            check=False,
        )

    def launch(self, *more: str) -> subprocess.CompletedProcess[str]:
        fixed = ("--site", MACHINE, "--walltime", "00:05:00", "--module", MODULE)
        return self.run("launch", "brought@1", *fixed, "--format", "json", *more)

    def wait(self, name: str, condition: Callable[[JobRecord], bool]) -> JobRecord:
        folder, until = LaunchFolder(self.launches / name), time.monotonic() + PATIENCE_S
        while not ((jobs := folder.jobs()) and condition(jobs[0])):
            assert time.monotonic() < until, (jobs, folder.log_path.read_text())
            time.sleep(0.2)
        return jobs[0]

    def end_all(self) -> None:
        self.fabric.close()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if "fabric.cli.launching" in words and str(self.state) in words[-1]:
                process.kill()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="sl") as short, running_slurm(Path(short)) as slurm:
        yield slurm


@pytest.fixture
def user(globus: Globus, tmp_path: Path) -> Iterator[User]:
    with running_hub(tmp_path, sites=()) as hub:
        hub.catalog.add_model("brought", "1", source="fixed-delay:", context_tokens=2048)
        user = User(globus, hub, tmp_path)
        try:
            yield user
        finally:
            user.end_all()


def far_site(**executor: Any) -> SiteSpec:
    site = load_site(shipped_sites()["local-slurm"]).model_dump(mode="json", exclude_defaults=True)
    far = {"kind": "globus-compute", "endpoint_id": str(uuid4()), **executor}
    site["system"]["queues"]["debug"]["units_per_node_hour"] = 1.0
    return SiteSpec.model_validate({**site, "name": MACHINE, "executor": far})


@contextmanager
def login_node(globus: Globus, slurm: Slurm, user: User, home: Path) -> Iterator[Endpoint]:
    """Yield the user's endpoint where Slurm is: as our templates make it, for these functions."""
    pool = get_rig_pool(globus, OWNER, LIMITS, shared=get_budget_path(user.launches))
    login = EndpointLogin(far_site(), user.launches, pool).start()
    allowed = tuple(login._functions[name] for name in FUNCTIONS)
    login.close()
    files = home / "endpoint"
    files.mkdir()
    for name, text in get_endpoint_files(far_site(), files, allowed).items():
        (files / name).write_text(text)
    with globus.endpoint(
        "login", owner=OWNER, template=files, task_environ=slurm.environ
    ) as endpoint:
        site = far_site(endpoint_id=str(endpoint.id), run_dir=str(home / "run"))
        text = yaml.safe_dump(site.model_dump(mode="json", exclude_defaults=True))
        (user.sites / f"{MACHINE}.yaml").write_text(text)
        yield endpoint


def test_a_launch_through_an_endpoint_lives_its_whole_life(
    globus: Globus, slurm: Slurm, user: User, tmp_path: Path
) -> None:
    with login_node(globus, slurm, user, tmp_path):
        planned = user.launch("--dry-run", "--account", "astro")
        assert planned.returncode == 0, planned.stderr
        plan = json.loads(planned.stdout)
        assert "#SBATCH --signal=B:USR1" in plan["script"]
        assert str(tmp_path / "run" / "launches") in plan["script"]
        assert plan["wait_s"]["p50"] is not None
        # The endpoint's own refusal, in its own words.
        assert plan["balance_unknown"].startswith("not asked: the file does not say how")
        assert slurm.run("squeue", "-h") == ""

        launched = user.launch("--wait")
        assert launched.returncode == 0, launched.stderr
        launch = json.loads(launched.stdout)
        assert launch["via"] == "endpoint"
        job = launch["jobs"][0]
        assert slurm.run("squeue", "-h", "-o", "%i %T").split() == [job["job_id"], "RUNNING"]
        assert user.fabric.complete("hi", model="brought@1", max_tokens=1).text == "word0"
        # What is secret of it is where it runs, and there until it has ended.
        assert not list(user.launches.rglob("*.spec.json"))
        assert user.run("logs", launch["name"]).returncode == 0

        stopped = user.run("stop", launch["name"])
        assert "its owner ended it" in stopped.stderr, stopped.stderr
        ended = user.wait(launch["name"], lambda job: job.is_told)
        assert (ended.state, ended.usage and ended.usage.source) == ("stopped", "scontrol")
        assert slurm.run("squeue", "-h") == ""
        assert not list((tmp_path / "run").rglob("*.spec.json"))
        [memo] = [line for line in user.fabric.usage().lines if line.kind == "memo"]
        assert memo.job == job["job_id"]
    # All of the user's commands together kept within what the service allows.
    assert globus.violations() == []


def test_an_endpoint_that_is_not_named_is_asked_for(user: User) -> None:
    site = load_site(shipped_sites()["local-slurm"]).model_dump(mode="json", exclude_defaults=True)
    (user.sites / f"{MACHINE}.yaml").write_text(yaml.safe_dump({**site, "name": MACHINE}))
    done = user.launch("--via", "endpoint")
    assert done.returncode != 0
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "launch_impossible"
    assert "names no endpoint" in error["message"]
