"""Launches from elsewhere: through the user's Globus Compute endpoint at the login node."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fabric.compute.endpoint import get_endpoint_files
from fabric.config import SiteSpec, load_site, shipped_sites
from fabric.launch.jobs import LaunchFolder
from fabric.launch.jobs.through import FUNCTIONS, LIMITS, EndpointLogin, get_budget_path
from fabric.testing.compute import get_rig_pool
from fabric.testing.globus import Endpoint, Globus
from fabric.testing.hub import RunningHub, running_hub
from fabric.testing.person import PATIENCE_S, Person
from fabric.testing.slurm import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OWNER = "alice"
MACHINE = "far"


class User(Person):
    """Somebody with a key and a Globus login, on a machine that knows no scheduler."""

    def __init__(self, globus: Globus, hub: RunningHub, folder: Path) -> None:
        # None of Slurm's commands are here.
        path = str(Path(sys.executable).parent)
        super().__init__(hub, folder, MACHINE, **globus.environ(OWNER) | {"PATH": path})
        self.launches.mkdir(parents=True)


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
        user.know(site.model_dump(mode="json", exclude_defaults=True))
        yield endpoint


def test_a_launch_through_an_endpoint_lives_its_whole_life(
    globus: Globus, slurm: Slurm, user: User, tmp_path: Path
) -> None:
    before = len(globus.violations())
    with login_node(globus, slurm, user, tmp_path):
        planned = user.try_launch("--dry-run", "--account", "astro")
        assert planned.returncode == 0, planned.stderr
        plan = json.loads(planned.stdout)
        assert "#SBATCH --signal=B:USR1" in plan["script"]
        assert str(tmp_path / "run" / "launches") in plan["script"]
        assert plan["wait_s"]["p50"] is not None
        # The endpoint's own refusal, in its own words.
        assert plan["balance_unknown"].startswith("not asked: the file does not say how")
        assert slurm.run("squeue", "-h") == ""

        launched = user.try_launch("--wait")
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
        ended = user.wait_job(launch["name"], lambda job: job.is_told)
        assert (ended.state, ended.usage and ended.usage.source) == ("stopped", "scontrol")
        assert slurm.run("squeue", "-h") == ""
        assert not list((tmp_path / "run").rglob("*.spec.json"))
        [memo] = [line for line in user.fabric.usage().lines if line.kind == "memo"]
        assert memo.job == job["job_id"]
    # All of the user's commands together kept within what the service allows.
    assert globus.violations()[before:] == []


@pytest.mark.timeout(600)
def test_jobs_are_found_again_when_their_endpoint_was_away(
    globus: Globus, slurm: Slurm, user: User, tmp_path: Path
) -> None:
    with login_node(globus, slurm, user, tmp_path) as endpoint:
        slurm.run("sbatch", "-N2", "--exclusive", "-t9", "--wrap", "sleep 900", "-o", "/dev/null")
        name, job_id = (launch := user.launch())["name"], launch["jobs"][0]["job_id"]
        endpoint.kill_core()
        endpoint.wait_offline()
        away = user.wait_job(name, lambda job: "is offline" in job.unseen)
        assert (away.state, away.job_id) == ("pending", job_id)
        assert f"The endpoint {endpoint.id} of far is offline" in away.unseen
        assert "`globus-compute-endpoint start`" in away.unseen
        assert "is offline" in user.run("instances", "--format", "json").stdout

        # What would be launched meanwhile is refused before anything is made.
        refused = user.try_launch()
        assert refused.returncode != 0
        error = json.loads(refused.stderr.splitlines()[-1])["error"]
        assert (error["code"], error["detail"]["machine"]) == ("endpoint_offline", MACHINE)
        assert len(LaunchFolder.all(user.launches)) == 1
        # The job starts, joins and serves, though nobody sees it.
        slurm.run("scancel", "-n", "wrap")
        instance = launch["jobs"][0]["instance"]
        until = time.monotonic() + PATIENCE_S
        while instance not in {one.instance for one in user.fabric.instances() if one.connected}:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert user.fabric.complete("hi", model="brought@1", max_tokens=1).text == "word0"

        endpoint.start_core()
        found = user.wait_job(name, lambda job: job.state == "ready")
        assert (found.job_id, found.unseen) == (job_id, "")
        assert "its owner ended it" in user.run("stop", name).stderr
        assert slurm.run("squeue", "-h") == ""


def test_an_endpoint_that_is_not_named_is_asked_for(user: User) -> None:
    site = load_site(shipped_sites()["local-slurm"]).model_dump(mode="json", exclude_defaults=True)
    user.know(site)
    done = user.try_launch("--via", "endpoint")
    assert done.returncode != 0
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "launch_impossible"
    assert "names no endpoint" in error["message"]
