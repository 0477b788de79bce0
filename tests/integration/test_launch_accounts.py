"""Launches that the cluster's own accounts refuse, and scripts that do not work there."""

from __future__ import annotations

import json
import os
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
            "-i add user root account=astro,spent",
            "-i modify account spent set GrpTRESMins=cpu=1",
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
    (sites / "here.yaml").write_text(yaml.safe_dump(shipped | {"name": "here"}))
    shipped["endpoint"]["worker_init"] = "module load nothing-of-the-kind"
    (sites / "broken.yaml").write_text(yaml.safe_dump(shipped | {"name": "broken"}))
    _, key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
    yield {
        **os.environ,
        **slurm.environ,
        "FABRIC_BASE_URL": hub.base_url,
        "FABRIC_API_KEY": key,
        "FABRIC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
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
    message = json.loads(done.stderr)["error"]["message"]
    assert "did not take the job" in message
    assert "Invalid account" in message


def test_a_module_line_that_fails_ends_the_job_and_is_shown(environ: dict[str, str]) -> None:
    done = launch(environ, "broken", "--account", "astro", "--wait")
    assert done.returncode != 0
    error: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])["error"]
    assert "FAILED" in error["message"]
    assert "module" in Path(error["detail"]["log_path"]).read_text()


def _detail(environ: dict[str, str], name: str) -> str:
    shown = json.loads(run(environ, "instances", name, "--format", "json").stdout)
    return str(shown[0]["jobs"][0]["detail"])
