"""A login node: jobs are submitted once, looked at, ended; from there and by its functions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fabric.config import SiteSpec
from fabric.errors import JobRefused, LaunchImpossible
from fabric.launch.jobs import LaunchRecord, Order, onlogin
from fabric.launch.jobs.login import LocalLogin, Sight
from fabric.launch.jobs.queue import JobPhase
from fabric.messages import InstanceSpec, Launch

PATIENCE_S = 60.0
TOKEN = "launch-token"


@pytest.fixture
def login(tmp_path: Path) -> LocalLogin:
    return LocalLogin(tmp_path / "site" / "launches")


def record(**changes: object) -> LaunchRecord:
    system = {"center": "Here", "scheduler": "pbspro", "sources": ["a test"], "checked": "2026-11"}
    site = SiteSpec.model_validate({"name": "here", "system": system})
    fields = {
        "name": "l-0a1b2c3d",
        "order": Order(model="m@1", machine="here", walltime="00:05:00"),
        "site": site,
        "queue": None,
        "hub_url": "http://127.0.0.1:1",
        "module": "platform",  # it writes a line and ends
        "created_at": datetime.now(UTC),
    }
    return LaunchRecord.model_validate(fields | changes)


def spec(instance: str = "inst_1") -> InstanceSpec:
    launch = Launch(
        instance=instance, site="here", model="m@1", source="fixed-delay:", digest=None, token=TOKEN
    )
    return InstanceSpec(launch=launch, session_url=None, direct_token="d", status_path="later")


def wait(look: Callable[[], Sight], phase: JobPhase) -> Sight:
    until = time.monotonic() + PATIENCE_S
    while (sight := look()).state.phase is not phase:
        assert time.monotonic() < until, sight
        time.sleep(0.1)
    return sight


def test_a_job_is_submitted_once_however_often_it_is_asked(login: LocalLogin, pbs: Path) -> None:
    (pbs / "full").touch()
    first = login.submit(record(), spec())
    assert login.submit(record(), spec()) == first
    assert LocalLogin(login._root).submit(record(), spec()) == first
    assert len(list(pbs.glob("[0-9]*"))) == 1
    sight = login.look(record(), {"inst_1": first})["inst_1"]
    assert sight.state.phase is JobPhase.QUEUED
    assert sight.state.reason == "Not Running: Insufficient amount of resource: ncpus"


def test_a_submission_that_was_cut_off_is_not_repeated(login: LocalLogin, pbs: Path) -> None:
    folder = login._folder(record())
    with folder.submission("inst_1") as submission:
        submission.begin()
    with pytest.raises(JobRefused, match="was killed before"):
        login.submit(record(), spec())
    assert list(pbs.glob("[0-9]*")) == []


def test_a_job_runs_and_its_end_is_told_with_what_it_took(login: LocalLogin, pbs: Path) -> None:
    (pbs / "full").touch()
    job_id = login.submit(record(), spec())
    jobs = login._root / "l-0a1b2c3d" / "jobs"
    given = InstanceSpec.model_validate_json((jobs / "inst_1.spec.json").read_bytes())
    assert given.status_path == str(jobs / "inst_1.json")
    (pbs / "full").unlink()
    sight = wait(lambda: login.look(record(), {"inst_1": job_id})["inst_1"], JobPhase.ENDED)
    assert sight.state.reason == "exit status 0"
    assert sight.usage is not None
    assert (sight.usage.source, sight.usage.num_nodes) == ("qstat", 1)
    assert not (jobs / "inst_1.spec.json").exists()
    assert oct(jobs.stat().st_mode & 0o777) == "0o700"
    assert "Linux" in login.read_logs(record(), "inst_1")["inst_1.log"]


def test_a_job_that_is_cancelled_while_it_waits_ends(login: LocalLogin, pbs: Path) -> None:
    (pbs / "full").touch()
    job_id = login.submit(record(), spec())
    login.cancel(record(), "inst_1", job_id)
    sight = wait(lambda: login.look(record(), {"inst_1": job_id})["inst_1"], JobPhase.ENDED)
    assert sight.usage is not None
    assert sight.usage.elapsed_s == 0


def test_a_job_whose_id_nobody_has_ends_when_it_starts(login: LocalLogin, pbs: Path) -> None:
    (pbs / "full").touch()
    job_id = login.submit(record(), spec())
    login.cancel(record(), "inst_1", None)
    (pbs / "full").unlink()
    sight = wait(lambda: login.look(record(), {"inst_1": job_id})["inst_1"], JobPhase.ENDED)
    assert sight.state.reason == "exit status 1"


@pytest.mark.parametrize(
    ("name", "instance"), [("../../x", "inst_1"), ("l-0a1b2c3d", "../../../x"), ("l-0a1b2c3d", "")]
)
def test_no_name_leads_out_of_the_folder(login: LocalLogin, name: str, instance: str) -> None:
    asked = record().model_copy(update={"name": name})
    for call in (
        lambda: login.submit(asked, spec(instance)),
        lambda: login.cancel(asked, instance, None),
        lambda: login.read_logs(asked, instance),
    ):
        with pytest.raises(LaunchImpossible):
            call()


# ---- by its functions ----------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    return json.loads(value.model_dump_json())


def test_the_functions_do_the_same(login: LocalLogin, pbs: Path, tmp_path: Path) -> None:
    run_dir, asked = str(tmp_path / "site"), as_json(record())
    script = onlogin.submit_job(asked, None, run_dir)["script"]
    assert "fabric.launch.jobs.inblock" in script
    assert list(pbs.glob("[0-9]*")) == []
    job_id = onlogin.submit_job(asked, as_json(spec()), run_dir)["job_id"]
    assert login.submit(record(), spec()) == job_id

    def look() -> Sight:
        told = json.loads(json.dumps(onlogin.poll_jobs(asked, {"inst_1": job_id}, run_dir)))
        return Sight.model_validate(told["jobs"]["inst_1"])

    assert wait(look, JobPhase.ENDED).usage is not None
    assert "inst_1.log" in onlogin.read_job_logs(asked, "inst_1", run_dir)["logs"]
    assert onlogin.cancel_job(asked, "inst_1", job_id, run_dir) == {}


def test_what_a_function_refuses_is_told_as_a_failure(tmp_path: Path, pbs: Path) -> None:
    run_dir, asked = str(tmp_path / "site"), as_json(record())
    gone = as_json(record(queue="gone"))
    told = onlogin.submit_job(gone, as_json(spec()), run_dir)["failure"]
    assert told["code"] == "job_refused"
    assert "qsub: Unknown queue" in told["message"]
    bad = as_json(spec()) | {"deadline_s": TOKEN}
    told = onlogin.submit_job(asked, bad, run_dir)["failure"]
    assert told["code"] == "invalid_parameter"
    assert TOKEN not in json.dumps(told)
    unsaid = onlogin.read_balance(as_json(record())["site"], "astro", None, run_dir)["failure"]
    assert unsaid["code"] == "setting_invalid"
