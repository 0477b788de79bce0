"""Launches that the cluster's own accounts refuse, and scripts that do not work there."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fabric.errors import BalanceUnavailable
from fabric.launch.balances import SlurmBalance
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.slurm import Slurm, running_slurm
from fabric.testing.slurm.user import MACHINE, User

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHARGE = {"unit": "billing hour", "balance": {"kind": "slurm"}}


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
            "-i add user nobody account=astro",
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
def user(hub: RunningHub, slurm: Slurm, tmp_path: Path) -> Iterator[User]:
    # A node of the rig has two cores, which bill two hours in an hour.
    user = User(hub, slurm, tmp_path, system={"charge": CHARGE})
    try:
        yield user
    finally:
        user.end_all()


def launch(user: User, *args: str) -> subprocess.CompletedProcess[str]:
    return user.try_launch(*args, walltime="00:30:00")


def test_an_account_with_units_left_pays(user: User) -> None:
    done = launch(user, "--account", "astro", "--wait")
    assert done.returncode == 0, done.stderr
    stopped = user.run("stop", json.loads(done.stdout)["name"])
    assert "its owner ended it" in stopped.stderr


def test_the_plan_shows_what_the_account_has_and_will_have(user: User) -> None:
    args = ("--site", MACHINE, "--walltime", "00:30:00", "--account", "astro", "--replicas", "2")
    done = user.run("launch", "brought@1", *args, "--dry-run")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "1 billing hour at most, a job" in shown
    assert "billing hours of astro left after it 9" in shown
    assert "when all of it has run, 2 billing hours at most" in shown


def test_a_launch_that_its_account_cannot_pay_is_refused_unless_forced(
    slurm: Slurm, user: User
) -> None:
    too_much = ("--account", "poor", "--replicas", "2")
    done = launch(user, *too_much)
    assert done.returncode != 0
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "allocation_too_small"
    assert (
        "'poor' at test-slurm has 1 billing hours left and the launch may take 2"
        in error["message"]
    )
    assert "--force" in error["message"]
    assert slurm.run("squeue", "-h") == ""
    forced = launch(user, *too_much, "--force", "--dry-run")
    assert forced.returncode == 0, forced.stderr
    plan = json.loads(forced.stdout)
    assert (plan["charge"], plan["total_charge"], plan["account"]) == (1.0, 2.0, "poor")
    assert (plan["balance"], plan["balance_unit"], plan["remains"]) == (1.0, "billing hours", -1.0)


def test_a_balance_that_the_centre_does_not_tell_is_a_warning(user: User) -> None:
    done = launch(user, "--account", "spent", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "no GrpTRESMins limits the billing of 'spent'" in done.stderr
    plan = json.loads(done.stdout)
    assert (plan["balance"], plan["remains"]) == (None, None)


def test_what_a_job_took_is_a_memo_of_the_statement(
    hub: RunningHub, slurm: Slurm, user: User
) -> None:
    name = json.loads(launch(user, "--account", "astro", "--wait").stdout)["name"]
    assert user.run("stop", name).returncode == 0
    [job] = user.wait(name, lambda shown: shown["jobs"][0]["is_told"])["jobs"]
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
    assert f"job {job['job_id']} of" in " ".join(user.run("usage").stdout.split())
    assert f"{job['charge']:.3g} billing hours" in user.run("instances", name).stdout
    hub.ledger.verify()


def test_an_account_out_of_units_is_told_while_its_job_waits(user: User) -> None:
    done = launch(user, "--account", "spent")
    assert done.returncode == 0, done.stderr
    name = json.loads(done.stdout)["name"]
    shown = user.wait(name, lambda shown: "Limit" in shown["jobs"][0]["detail"])
    assert "AssocGrpCPUMinutesLimit" in shown["jobs"][0]["detail"]
    stopped = user.run("stop", name)
    assert "its owner ended it" in stopped.stderr


def test_what_the_scheduler_refuses_comes_with_its_words(user: User) -> None:
    done = launch(user, "--account", "nobodys")
    assert done.returncode != 0
    assert "tells of no allocation of 'nobodys'" in done.stderr
    message = json.loads(done.stderr.strip().splitlines()[-1])["error"]["message"]
    assert "did not take the job" in message
    assert "Invalid account" in message


def test_a_module_line_that_fails_ends_the_job_and_is_shown(
    hub: RunningHub, slurm: Slurm, tmp_path: Path
) -> None:
    user = User(hub, slurm, tmp_path, endpoint={"worker_init": "module load nothing-of-the-kind"})
    done = launch(user, "--account", "astro", "--wait")
    assert done.returncode != 0
    error: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])["error"]
    assert "FAILED" in error["message"]
    assert "module" in Path(error["detail"]["log_path"]).read_text()
    user.end_all()


NOBODY = """#!/bin/sh
exec setpriv --reuid=nobody --regid=nogroup --clear-groups {command} "$@"
"""


def test_a_user_whom_the_controller_shows_no_account_asks_the_database(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``PrivateData=usage`` has it; the database knows usage up to the last full hour."""
    assert os.geteuid() == 0, "run it as root, who alone can run commands as somebody else"
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    told = asyncio.run(SlurmBalance().balance("astro"))
    for name in ("scontrol", "sacctmgr", "sreport"):
        path = tmp_path / name
        path.write_text(NOBODY.format(command=shutil.which(name)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    summed = asyncio.run(SlurmBalance().balance("astro"))
    assert summed.unit == told.unit == "billing hours"
    assert summed.granted == told.granted == Decimal(100)
    assert summed.used is not None
    assert 0 <= summed.used <= 1
    assert summed.available == Decimal(100) - summed.used
    assert (summed.as_of.minute, summed.as_of.second) == (0, 0)
    assert timedelta() <= datetime.now(UTC) - summed.as_of <= timedelta(hours=1, minutes=5)
    with pytest.raises(BalanceUnavailable, match="no allocation of 'nobodys'"):
        asyncio.run(SlurmBalance().balance("nobodys"))
    with pytest.raises(BalanceUnavailable, match="no GrpTRESMins of its own limits the billing"):
        asyncio.run(SlurmBalance().balance("spent"))
