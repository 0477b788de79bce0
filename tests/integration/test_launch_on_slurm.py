"""Bring your own allocation: the command line, a real Slurm, real instances, a real hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fabric.errors import FabricError, NotFound, PermissionDenied
from fabric.sdk import Fabric
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import Slurm, running_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 150.0
MODEL = "brought@1"
MACHINE = "test-slurm"
SITE = {
    "name": MACHINE,
    "title": "A Slurm of the tests' own",
    "system": {
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
    },
    "endpoint": {"scheduler": "slurm", "walltime": "00:10:00", "exclusive": False},
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # Sockets have short names; pytest's folders do not.
    with tempfile.TemporaryDirectory(prefix="sl") as name, running_slurm(Path(name)) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_model(
            "brought", "1", source="fixed-delay:token_s=0.02", context_tokens=2048
        )
        hub.catalog.add_model("broken", "1", source="fixed-delay:broken=1", context_tokens=2048)
        hub.catalog.add_model("secret", "1", source="fixed-delay:", context_tokens=2048)
        yield hub


@pytest.fixture
def user(hub: RunningHub, slurm: Slurm, tmp_path: Path) -> Iterator[User]:
    user = User(hub, slurm, tmp_path)
    try:
        yield user
    finally:
        user.end_all()


class User:
    """Somebody with a key that may launch, at the cluster's login node."""

    def __init__(self, hub: RunningHub, slurm: Slurm, folder: Path) -> None:
        _, self.key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
        self.slurm = slurm
        self.hub = hub
        self.state = folder / "s"
        sites = folder / "config" / "fabric" / "sites"
        sites.mkdir(parents=True)
        (sites / f"{MACHINE}.yaml").write_text(yaml.safe_dump(SITE))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FABRIC_")}
        self.environ = kept | {
            **slurm.environ,
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": self.key,
            "FABRIC_STATE_DIR": str(self.state),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "COLUMNS": "120",
        }
        self.fabric = Fabric(hub.base_url, self.key)

    def run(self, *args: str, environ: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fabric.cli", *args],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S + 30,
            check=False,
        )

    def launch(self, *args: str, model: str = MODEL, walltime: str = "00:05:00") -> dict[str, Any]:
        done = self.run(
            *("launch", model, "--site", MACHINE, "--walltime", walltime),
            *("--format", "json", "--module", MODULE, *args),
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def shown(self, name: str) -> dict[str, Any]:
        done = self.run("instances", name, "--format", "json")
        assert done.returncode == 0, done.stderr
        (launch,) = json.loads(done.stdout)
        return dict(launch)

    def wait(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while not condition(launch := self.shown(name)):
            assert time.monotonic() < until, launch
            time.sleep(0.3)
        return launch

    def end_all(self) -> None:
        self.fabric.close()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if "fabric.cli.launching" in words and str(self.state) in words[-1]:
                process.kill()
        for job in self.slurm.run("squeue", "-h", "-o", "%i").split():
            self.slurm.try_run("scancel", job)


def states(launch: dict[str, Any]) -> list[str]:
    return [job["state"] for job in launch["jobs"]]


def test_dry_run_prints_the_plan_and_the_very_script(user: User) -> None:
    args = ("launch", MODEL, "--site", MACHINE, "--walltime", "00:30:00", "--dry-run")
    done = user.run(*args)
    assert done.returncode == 0, done.stderr
    assert "1 node-hour at most, a job" in done.stdout
    assert "#SBATCH --time=30" in done.stdout
    assert "#SBATCH --signal=B:USR1@120" in done.stdout
    assert "#SBATCH --partition=debug" in done.stdout
    assert user.slurm.run("squeue", "-h") == ""
    assert user.fabric.instances() == ()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--walltime", "02:00:00"), "debug lets a job of 1 node run for 01:00:00 at most"),
        (("--walltime", "00:10:00", "--nodes", "3"), "debug takes jobs of at most 2 nodes"),
        (("--walltime", "00:10:00", "--queue", "none"), "has the queues debug, small"),
        (("--walltime", "10"), "write hours, minutes and seconds"),
    ],
)
def test_what_the_machine_would_refuse_is_refused_here(
    user: User, args: tuple[str, ...], sentence: str
) -> None:
    done = user.run("launch", MODEL, "--site", MACHINE, *args)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert user.slurm.run("squeue", "-h") == ""


def test_a_launch_serves_its_owner_and_ends_when_asked(user: User, hub: RunningHub) -> None:
    launch = user.launch("--wait")
    assert states(launch) == ["ready"]
    answer = user.fabric.complete("hello", model=MODEL, max_tokens=3)
    assert (answer.text, answer.charge_usu) == ("word0 word1 word2", 0)
    (mine,) = user.fabric.instances()
    assert (mine.machine, mine.connected) == (MACHINE, True)

    done = user.run("stop", launch["name"])
    assert "its owner ended it" in done.stderr, done.stderr
    assert states(user.shown(launch["name"])) == ["stopped"]
    assert user.slurm.run("squeue", "-h") == ""


def test_a_job_hands_over_to_the_next_without_a_failed_request(user: User) -> None:
    """A walltime of two minutes, four streams at once all the while."""
    launch = user.launch("--wait", "--keep-alive-until", "10m", walltime="00:02:00")
    name, stop = launch["name"], threading.Event()

    def ask() -> list[str]:
        answers = []
        with Fabric(user.hub.base_url, user.key) as fabric:
            while not stop.is_set():
                stream = fabric.stream("hello", model=MODEL, max_tokens=60, temperature=0)
                answers.append("".join(chunk.text for chunk in stream))
        return answers

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            after = user.wait(
                name, lambda shown: states(shown)[0] == "stopped" and "ready" in states(shown)
            )
        finally:
            stop.set()
        answers = [answer for one in asking for answer in one.result()]
    # Where the machine is busy, the first may have been told by its own clock a little before.
    assert after["jobs"][0]["detail"] in ("its successor is ready", "it was asked to leave")
    assert len(set(answers)) == 1
    assert len(answers) > 8


def test_a_cancelled_job_is_noticed_and_replaced_while_it_is_wanted(user: User) -> None:
    launch = user.launch("--wait", "--keep-alive-until", "10m", "--replicas", "2")
    name = launch["name"]
    both = user.wait(name, lambda shown: states(shown) == ["ready", "ready"])
    job_of = {job["instance"]: job["job_id"] for job in both["jobs"]}
    with Fabric(user.hub.base_url, user.key) as fabric:
        stream = fabric.stream("hello", model=MODEL, max_tokens=600, temperature=0)
        text = next(stream).text
        # Instances tell their load every two seconds.
        while not (running := [one.instance for one in fabric.instances() if one.num_running]):
            text += next(stream).text
        (busy,) = running
        user.slurm.run("scancel", "--signal=KILL", "--full", job_of[busy])
        # The stream goes on at the other instance, from the token it had come to.
        text += "".join(chunk.text for chunk in stream)
    assert text.split() == [f"word{i}" for i in range(600)]
    after = user.wait(name, lambda shown: states(shown).count("ready") == 2)
    assert sorted(states(after)) == ["failed", "ready", "ready"]
    (ended,) = (job for job in after["jobs"] if job["state"] == "failed")
    assert ended["job_id"] == job_of[busy]
    assert "its job ended" in ended["detail"]


def test_jobs_that_keep_failing_are_not_submitted_for_ever(user: User) -> None:
    done = user.run(
        *("launch", "broken@1", "--site", MACHINE, "--walltime", "00:05:00", "--wait"),
        *("--keep-alive-until", "1h", "--module", MODULE),
    )
    assert done.returncode != 0
    assert "it was told so" in done.stderr
    assert "Its log is" in done.stderr
    assert "Traceback" not in done.stderr
    launched = json.loads(user.run("instances", "--all", "--format", "json").stdout)
    assert [states(one) for one in launched] == [["failed"] * 3]
    assert user.slurm.run("squeue", "-h") == ""


def test_a_launch_waits_behind_a_full_cluster_and_says_why(user: User) -> None:
    user.slurm.run("sbatch", "-N2", "--exclusive", "-t1", "--wrap", "sleep 600", "-o", "/dev/null")
    launch = user.launch()
    waiting = user.wait(launch["name"], lambda shown: "Resources" in shown["jobs"][0]["detail"])
    assert states(waiting) == ["pending"]
    user.slurm.run("scancel", "-n", "wrap")
    user.wait(launch["name"], lambda shown: states(shown) == ["ready"])


def test_a_launcher_that_was_killed_finds_its_jobs_again(user: User) -> None:
    launch = user.launch("--wait")
    (watching,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if "fabric.cli.launching" in (process.info["cmdline"] or ())
        and launch["name"] in process.info["cmdline"][-1]
    )
    watching.send_signal(signal.SIGKILL)
    watching.wait(10)
    left = user.run("instances")
    assert f"Nobody watches {launch['name']}" in left.stderr
    assert user.fabric.complete("hello", model=MODEL, max_tokens=1).text == "word0"

    assert user.run("instances", "--watch").returncode == 0
    stopped = user.run("stop", launch["name"])
    assert "its owner ended it" in stopped.stderr, stopped.stderr
    assert [job["job_id"] for job in user.shown(launch["name"])["jobs"]] == [
        launch["jobs"][0]["job_id"]
    ]
    assert user.slurm.run("squeue", "-h") == ""


def test_a_dead_node_ends_its_instance(user: User) -> None:
    launch = user.launch("--wait")
    node = user.slurm.run("squeue", "-h", "-o", "%N").strip()
    try:
        user.slurm.kill_node(node)
        shown = user.wait(launch["name"], lambda shown: states(shown) == ["failed"])
        assert "its job ended" in shown["jobs"][0]["detail"]
    finally:
        user.slurm.start_node(node)


def test_an_idle_instance_leaves(user: User) -> None:
    launch = user.launch("--wait", "--idle-stop", "3s")
    shown = user.wait(launch["name"], lambda shown: shown["ended_at"] is not None)
    assert states(shown) == ["stopped"]
    assert shown["detail"] == "it had nothing to do for 3 s"


def test_a_private_instance_is_its_owners_alone(user: User, hub: RunningHub) -> None:
    launch = user.launch("--wait", "--sharing", "private", model="secret@1")
    instance = launch["jobs"][0]["instance"]
    with Fabric(hub.base_url, hub.api_key) as colleague:
        with pytest.raises(FabricError) as caught:
            colleague.complete("hello", model="secret@1", max_tokens=1, deadline_s=5)
        assert caught.value.code in ("no_replica", "rate_missing", "deadline_exceeded")
        seen = {one.instance for site in colleague.sites() for one in site.replicas}
        assert instance not in seen
        with pytest.raises(PermissionDenied):
            colleague.drain_instance(instance)
    _, other = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
    with Fabric(hub.base_url, other) as other_key, pytest.raises(NotFound):
        other_key.drain_instance(instance)
    assert user.fabric.complete("hello", model="secret@1", max_tokens=1).text == "word0"
