"""Launches that the cluster's own accounts refuse, and scripts that do not work there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fabric.config import shipped_sites
from fabric.testing.commands import get_environ
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import Slurm, running_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="sl") as short,
        running_slurm(Path(short), accounting=True) as slurm,
    ):
        for command in (
            "-i add account astro Description=a Organization=b",
            "-i add account spent Description=a Organization=b",
            "-i add account poor Description=a Organization=b",
            "-i add user root account=astro,spent,poor",
            "-i modify account astro set GrpTRESMins=billing=6000",
            "-i modify account spent set GrpTRESMins=cpu=1",
            "-i modify account poor set GrpTRESMins=billing=60",
        ):
            slurm.run("sacctmgr", *command.split())
        yield slurm


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_model("brought", "1", source="fixed-delay:", context_tokens=2048)
        yield hub


@pytest.fixture
def environ(slurm: Slurm, hub: RunningHub, tmp_path: Path) -> Iterator[dict[str, str]]:
    sites = tmp_path / "config" / "fabric" / "sites"
    sites.mkdir(parents=True)
    shipped = yaml.safe_load(shipped_sites()["local-slurm"].read_text())
    # A node of the rig has two cores, which bill two hours in an hour.
    shipped["system"]["queues"]["debug"]["units_per_node_hour"] = 2.0
    shipped["system"]["charge"] = {"unit": "billing hour", "balance": {"kind": "slurm"}}
    (sites / "here.yaml").write_text(yaml.safe_dump(shipped | {"name": "here"}))
    shipped["endpoint"]["worker_init"] = "module load nothing-of-the-kind"
    (sites / "broken.yaml").write_text(yaml.safe_dump(shipped | {"name": "broken"}))
    _, key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
    yield get_environ(tmp_path, hub, **slurm.environ, FABRIC_API_KEY=key)
    for job in slurm.run("squeue", "-h", "-o", "%i").split():
        slurm.try_run("scancel", job)


def run(environ: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fabric.cli", *args],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S + 60,
        check=False,
    )


def launch(environ: dict[str, str], site: str, *more: str) -> subprocess.CompletedProcess[str]:
    args = ("--site", site, "--walltime", "00:30:00", "--module", MODULE, "--format", "json")
    return run(environ, "launch", "brought@1", *args, *more)


def test_an_account_with_units_left_pays(environ: dict[str, str]) -> None:
    done = launch(environ, "here", "--account", "astro", "--wait")
    assert done.returncode == 0, done.stderr
    stopped = run(environ, "stop", json.loads(done.stdout)["name"])
    assert "its owner ended it" in stopped.stderr


def test_the_plan_shows_what_the_account_has_and_will_have(environ: dict[str, str]) -> None:
    args = ("--site", "here", "--walltime", "00:30:00", "--account", "astro", "--replicas", "2")
    done = run(environ, "launch", "brought@1", *args, "--dry-run")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "1 billing hour at most, a job" in shown
    assert "billing hours of astro left after it 9" in shown
    assert "when all of it has run, 2 billing hours at most" in shown


def test_a_launch_that_its_account_cannot_pay_is_refused_unless_forced(
    slurm: Slurm, environ: dict[str, str]
) -> None:
    too_much = ("--account", "poor", "--replicas", "2")
    done = launch(environ, "here", *too_much)
    assert done.returncode != 0
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "allocation_too_small"
    assert "'poor' at here has 1 billing hours left and the launch may take 2" in error["message"]
    assert "--force" in error["message"]
    assert slurm.run("squeue", "-h") == ""
    forced = launch(environ, "here", *too_much, "--force", "--dry-run")
    assert forced.returncode == 0, forced.stderr
    plan = json.loads(forced.stdout)
    assert (plan["charge"], plan["total_charge"], plan["account"]) == (1.0, 2.0, "poor")
    assert (plan["balance"], plan["balance_unit"], plan["remains"]) == (1.0, "billing hours", -1.0)


def test_a_balance_that_the_centre_does_not_tell_is_a_warning(environ: dict[str, str]) -> None:
    done = launch(environ, "here", "--account", "spent", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "no GrpTRESMins limits the billing of 'spent'" in done.stderr
    plan = json.loads(done.stdout)
    assert (plan["balance"], plan["remains"]) == (None, None)


def test_what_a_job_took_is_a_memo_of_the_statement(
    hub: RunningHub, slurm: Slurm, environ: dict[str, str]
) -> None:
    name = json.loads(launch(environ, "here", "--account", "astro", "--wait").stdout)["name"]
    assert run(environ, "stop", name).returncode == 0
    until = time.monotonic() + PATIENCE_S
    while not (job := _job(environ, name))["is_told"]:
        assert time.monotonic() < until, job
        time.sleep(0.5)
    told = slurm.run("sacct", "-nPX", "-j", job["job_id"], "-o", "ElapsedRaw,NNodes,Account")
    elapsed_s, nodes, account = told.strip().split("|")
    assert job["usage"] == {
        "elapsed_s": float(elapsed_s),
        "num_nodes": int(nodes),
        "source": "sacct",
    }
    assert job["charge"] == pytest.approx(2.0 * float(elapsed_s) / 3600)
    [memo] = [line for line in hub.ledger.statement(PROJECT).lines if line.job == job["job_id"]]
    assert (memo.kind, memo.amount_usu, account) == ("memo", 0, "astro")
    assert f"job {job['job_id']} of {name}:" in memo.memo
    assert "billing hours of astro (1 node" in memo.memo
    assert f"job {job['job_id']} of" in " ".join(run(environ, "usage").stdout.split())
    assert f"{job['charge']:.3g} billing hours" in run(environ, "instances", name).stdout
    hub.ledger.verify()


def test_an_account_out_of_units_is_told_while_its_job_waits(environ: dict[str, str]) -> None:
    done = launch(environ, "here", "--account", "spent")
    assert done.returncode == 0, done.stderr
    name = json.loads(done.stdout)["name"]
    until = time.monotonic() + PATIENCE_S
    while "Limit" not in (detail := _detail(environ, name)):
        assert time.monotonic() < until, detail
        time.sleep(0.5)
    assert "AssocGrpCPUMinutesLimit" in detail
    stopped = run(environ, "stop", name)
    assert "its owner ended it" in stopped.stderr


def test_what_the_scheduler_refuses_comes_with_its_words(environ: dict[str, str]) -> None:
    done = launch(environ, "here", "--account", "nobodys")
    assert done.returncode != 0
    assert "tells of no allocation of 'nobodys'" in done.stderr
    message = json.loads(done.stderr.strip().splitlines()[-1])["error"]["message"]
    assert "did not take the job" in message
    assert "Invalid account" in message


def test_a_module_line_that_fails_ends_the_job_and_is_shown(environ: dict[str, str]) -> None:
    done = launch(environ, "broken", "--account", "astro", "--wait")
    assert done.returncode != 0
    error: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])["error"]
    assert "FAILED" in error["message"]
    assert "module" in Path(error["detail"]["log_path"]).read_text()


def _detail(environ: dict[str, str], name: str) -> str:
    return str(_job(environ, name)["detail"])


def _job(environ: dict[str, str], name: str) -> dict[str, Any]:
    shown = json.loads(run(environ, "instances", name, "--format", "json").stdout)
    return dict(shown[0]["jobs"][0])
