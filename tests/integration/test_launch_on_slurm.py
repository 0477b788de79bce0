"""Bring your own allocation: the command line, a real Slurm, real instances, a real hub."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from fabric.cli.main import fabric as fabric_user
from fabric.errors import FabricError, NotFound, PermissionDenied
from fabric.sdk import Fabric
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import Slurm
from fabric.testing.slurm.user import MACHINE, User, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "brought@1"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_model(
            "brought", "1", source="fixed-delay:token_s=0.02", context_tokens=2048
        )
        hub.catalog.add_model("broken", "1", source="fixed-delay:broken=1", context_tokens=2048)
        hub.catalog.add_model("secret", "1", source="fixed-delay:", context_tokens=2048)
        yield hub


def test_dry_run_prints_the_plan_and_the_very_script(user: User) -> None:
    args = ("launch", MODEL, "--site", MACHINE, "--walltime", "00:30:00", "--dry-run")
    done = user.run(*args)
    assert done.returncode == 0, done.stderr
    assert "1 node-hour at most, a job" in done.stdout
    assert "read from where they are: no disk of the nodes is known" in done.stdout
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
        (("--walltime", "00:00:00"), "ask for one at least"),
        (("--walltime", "00:10:00", "--keep-alive-until", "2020-01-01"), "'2020-01-01' is over"),
    ],
)
def test_what_the_machine_would_refuse_is_refused_here(
    user: User, args: tuple[str, ...], sentence: str
) -> None:
    words = ["launch", MODEL, "--site", MACHINE, *args]
    done = CliRunner(env=user.environ).invoke(fabric_user, words)
    assert done.exit_code != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert user.slurm.run("squeue", "-h") == ""


def test_a_partition_that_slurm_does_not_have_is_refused_in_its_words(
    hub: RunningHub, slurm: Slurm, tmp_path: Path
) -> None:
    """The site's file has it: whoever wrote that was wrong."""
    queues = {"gone": {"kind": "partition", "nodes": "cpu", "max_walltime": "01:00:00"}}
    user = User(hub, slurm, tmp_path, system={"queues": queues})
    done = user.try_launch("--queue", "gone", model=MODEL)
    assert done.returncode != 0
    message = json.loads(done.stderr.strip().splitlines()[-1])["error"]["message"]
    assert "did not take the job" in message
    assert "invalid partition specified: gone" in message
    user.end_all()


def test_a_launch_serves_its_owner_and_ends_when_asked(user: User, hub: RunningHub) -> None:
    launch = user.launch("--wait", model=MODEL)
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
    """A walltime of a minute, four streams at once all the while."""
    launch = user.launch("--wait", "--keep-alive-until", "10m", walltime="00:01:00", model=MODEL)
    name, stop = launch["name"], threading.Event()

    def ask() -> list[tuple[str, str]]:
        answers = []
        with Fabric(user.hub.base_url, user.key) as fabric:
            while not stop.is_set():
                stream = fabric.stream("hello", model=MODEL, max_tokens=60, temperature=0)
                text = "".join(chunk.text for chunk in stream)
                answers.append((text, stream.result.instance))
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
    assert len({text for text, _ in answers}) == 1
    assert {one for _, one in answers} >= {job["instance"] for job in after["jobs"][:2]}


def test_a_cancelled_job_is_noticed_and_replaced_while_it_is_wanted(user: User) -> None:
    launch = user.launch("--wait", "--keep-alive-until", "10m", "--replicas", "2", model=MODEL)
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


def test_replicas_share_the_work_and_one_more_waits_behind_the_full_cluster(user: User) -> None:
    """Of four cores one is somebody else's at first."""
    user.slurm.run("sbatch", "-n1", "-t9", "--wrap", "sleep 540", "-o", "/dev/null")
    name = user.launch("--replicas", "4", model=MODEL)["name"]
    user.wait(name, lambda shown: sorted(states(shown)) == ["pending"] + 3 * ["ready"])
    full = user.wait(name, lambda shown: any("Resources" in job["detail"] for job in shown["jobs"]))
    assert len({job["job_id"] for job in full["jobs"]}) == 4
    three = {job["instance"] for job in full["jobs"] if job["state"] == "ready"}
    assert {one.instance for one in user.fabric.instances() if one.connected} == three
    with ThreadPoolExecutor(6) as pool:
        asking = [
            pool.submit(user.fabric.complete, "hello", model=MODEL, max_tokens=150)
            for _ in range(6)
        ]
        assert {one.result().instance for one in asking} == three

    user.slurm.run("scancel", "-n", "wrap")
    user.wait(name, lambda shown: states(shown) == 4 * ["ready"])
    stopped = user.run("stop", name)
    assert "its owner ended it" in stopped.stderr, stopped.stderr
    assert states(user.shown(name)) == 4 * ["stopped"]
    assert user.slurm.run("squeue", "-h") == ""


def test_a_launcher_that_was_killed_finds_its_jobs_again(user: User) -> None:
    launch = user.launch("--wait", model=MODEL)
    (watching,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if "fabric.cli.launching" in (process.info["cmdline"] or ())
        and launch["name"] in process.info["cmdline"][-1]
    )
    watching.send_signal(signal.SIGKILL)
    watching.wait(30)
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
    launch = user.launch("--wait", model=MODEL)
    node = user.slurm.run("squeue", "-h", "-o", "%N").strip()
    try:
        user.slurm.kill_node(node)
        shown = user.wait(launch["name"], lambda shown: states(shown) == ["failed"])
        assert "its job ended" in shown["jobs"][0]["detail"]
    finally:
        user.slurm.start_node(node)


def test_an_idle_instance_leaves(user: User) -> None:
    launch = user.launch("--wait", "--idle-stop", "3s", model=MODEL)
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
