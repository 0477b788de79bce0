"""Launches on PBS Professional: our provider's scripts and commands, stand-ins of PBS's own.

Submissions, polls and ends go the real way (Parsl's PBSProProvider, ``qstat -x -f -F json``); the
commands of tests/data/pbs run the jobs here and answer in the recorded form.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fabric.testing.hub import RunningHub, running_hub, wait_until
from fabric.testing.person import Person

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHIMS = Path(__file__).parents[1] / "data" / "pbs"
BALANCES = SHIMS.parent / "balances"
FULL = "Not Running: Insufficient amount of resource: ncpus"
SITE = {
    "system": {
        "center": "Here",
        "scheduler": "pbspro",
        "nodes": {"cpu": {"cores": 2, "memory_gb": 4, "devices": 0}},
        "queues": {
            "workq": {"nodes": "cpu", "default": True, "units_per_node_hour": 3600.0},
            "gone": {"nodes": "cpu"},
        },
        "charge": {"unit": "SU", "balance": {"kind": "showusage"}},
        "sources": ["the test"],
        "checked": "2026-11",
    },
    "endpoint": {"scheduler": "pbspro", "walltime": "00:10:00", "cpus_per_node": 2},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_model("brought", "1", source="fixed-delay:", context_tokens=2048)
        yield hub


class Cluster(Person):
    """Somebody with a key, at the login node of a PBS."""

    def __init__(self, hub: RunningHub, folder: Path) -> None:
        self.jobs = folder / "pbs"
        self.jobs.mkdir()
        path = f"{folder}:{SHIMS}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        shown, usage = (BALANCES / "showusage.txt").read_text(), folder / "showusage"
        usage.write_text(f"#!{sys.executable} -IS\nprint({shown!r})\n")
        usage.chmod(0o755)
        super().__init__(hub, folder, "test-pbs", PATH=path, PBS_SHIM=str(self.jobs))
        self.know(SITE)

    def end_all(self) -> None:
        super().end_all()
        for keeper in self.jobs.glob("*/keeper"):
            keeper.with_name("end").touch()
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(keeper.read_text())).wait(30)


@pytest.fixture
def pbs(hub: RunningHub, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(hub, tmp_path)
    try:
        yield cluster
    finally:
        cluster.end_all()


def test_a_job_waits_runs_serves_ends_and_is_accounted_for(pbs: Cluster) -> None:
    (pbs.jobs / "full").touch()
    shares = ("--account", "abc123", "--sharing", "private", "--overflow")
    name = pbs.launch(*shares)["name"]
    waiting = pbs.wait_job(name, lambda job: bool(job.detail))
    assert (waiting.state, waiting.detail) == ("pending", FULL)
    (pbs.jobs / "full").unlink()
    ready = pbs.wait_job(name, lambda job: job.state == "ready")
    assert pbs.fabric.complete("hello", model="brought@1", max_tokens=1).text == "word0"
    left = "account abc123: 19,873.7 "
    wait_until(lambda: any(left in one.detail for one in pbs.fabric.sites()), timeout_s=60)
    assert left in pbs.run("explain", "hello", "--model", "brought@1").stdout
    assert [one.overflow for one in pbs.fabric.instances()] == [True]
    stopped = pbs.run("stop", name)
    assert "its owner ended it" in stopped.stderr, stopped.stderr

    job = pbs.wait_job(name, lambda job: job.is_told)
    assert job.usage is not None
    assert (job.state, job.usage.source) == ("stopped", "qstat")
    # A node's second costs a unit there.
    assert job.charge == pytest.approx(job.usage.elapsed_s) != 0
    [memo] = [line for line in pbs.fabric.usage().lines if line.kind == "memo"]
    assert (memo.job, memo.amount_usu) == (ready.job_id, 0)
    assert f"{job.charge:,.4g} SUs of abc123 (1 node" in memo.memo
    shown = pbs.run("instances", name, environ={"COLUMNS": "200"}).stdout
    assert f"{job.charge:.3g} SUs" in shown
    assert " private, overflow " in shown


def test_a_job_that_was_killed_by_hand_is_noticed(pbs: Cluster) -> None:
    launch = pbs.launch("--wait")
    job_id = launch["jobs"][0]["job_id"]
    subprocess.run([SHIMS / "qdel", job_id], env=pbs.environ, check=True)
    ended = pbs.wait_job(launch["name"], lambda job: job.ended_at is not None)
    # Whether its instance has told that it drains is a matter of moments.
    assert ended.state in ("stopped", "failed")
    assert pbs.fabric.instances() == ()


def test_what_qsub_refuses_comes_with_its_words(pbs: Cluster) -> None:
    done = pbs.try_launch("--queue", "gone")
    assert done.returncode != 0
    assert "qsub: Unknown queue" in done.stderr
    assert "Traceback" not in done.stderr
