"""The launcher when answers get lost: of the login node, and of the hub.

Jobs run by a real submission to the PBS of tests/data/pbs; the hub is a record of what it was told.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fabric.config import SiteSpec
from fabric.errors import (
    FabricError,
    HubUnreachable,
    JobsFailing,
    LaunchImpossible,
    NotFound,
    RequestInvalid,
    SettingInvalid,
    TaskLost,
)
from fabric.launch.jobs import JobRecord, LaunchFolder, LaunchRecord, Order
from fabric.launch.jobs import launcher as launcher_module
from fabric.launch.jobs.history import History
from fabric.launch.jobs.hub import OwnInstanceLike
from fabric.launch.jobs.launcher import Launcher
from fabric.launch.jobs.login import LocalLogin
from fabric.messages import InstanceSpec, InstanceState, Launch

MAX_STEPS = 300
FULL = "Not Running: Insufficient amount of resource: ncpus"


@dataclass
class Told:
    """A hub: what it was told, and how often it is not there when a job is reported."""

    num_failures: int = 0
    is_away: bool = False
    expected: dict[str, float] = field(default_factory=dict)
    jobs: list[Mapping[str, object]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    balances: list[Mapping[str, object]] = field(default_factory=list)
    num_added: int = 0

    def add_instance(
        self,
        model: str,
        machine: str,
        *,
        sharing: str,
        overflow: bool | None,
        lifetime_s: float,
    ) -> Mapping[str, object]:
        if self.is_away:
            raise HubUnreachable(url="http://hub", reason="it is away")
        self.num_added += 1
        launch = Launch(
            instance=f"inst_{self.num_added}",
            site=machine,
            model=model,
            source="fixed-delay:",
            digest=None,
            token="t",
        )
        return dict(json.loads(launch.model_dump_json()))

    def instances(self) -> Sequence[OwnInstanceLike]:
        return ()

    def expect_instance(self, instance: str, ready_in_s: float) -> None:
        self.expected[instance] = ready_in_s

    def drain_instance(self, instance: str) -> None:
        raise NotFound(kind="connected instance", name=instance)

    def end_instance(self, instance: str, reason: str, *, failed: bool = False) -> None:
        self.ended.append(instance)

    def report_job(self, instance: str, job: Mapping[str, object]) -> object:
        if self.num_failures:
            self.num_failures -= 1
            raise HubUnreachable(url="http://hub", reason="it is away")
        self.jobs.append(job)
        return job

    def report_balance(self, instance: str, balance: Mapping[str, object]) -> None:
        self.balances.append(balance)


class Forgetful(LocalLogin):
    """A way to the login node on which the answers to submissions get lost at first."""

    num_lost = 0

    def submit(self, record: LaunchRecord, spec: InstanceSpec) -> str:
        job_id = super().submit(record, spec)
        if self.num_lost:
            self.num_lost -= 1
            raise TaskLost(reason="its endpoint was restarted")
        return job_id


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "SETTLE_POLL_S", 0.1)


def begin(root: Path, **changes: object) -> LaunchFolder:
    system = {
        "center": "Here",
        "scheduler": "pbspro",
        "queues": {"workq": {"units_per_node_hour": 2.0}},
        "charge": {"unit": "SU"},
        "sources": ["a test"],
        "checked": "2026-11",
    }
    folder = LaunchFolder.create(root)
    order = {"model": "m@1", "machine": "here", "walltime": "00:05:00", "account": "astro"}
    folder.write_launch(
        LaunchRecord(
            name=folder.name,
            order=Order.model_validate(order | changes),
            site=SiteSpec.model_validate({"name": "here", "system": system}),
            queue="workq",
            hub_url="http://127.0.0.1:1",
            module="timeit",  # it ends after a second or two
            created_at=datetime.now(UTC),
        )
    )
    return folder


def make(folder: LaunchFolder, hub: Told, login: LocalLogin) -> Launcher:
    return Launcher(folder, hub, History(folder.path.parent / "history.jsonl"), login)


def only(folder: LaunchFolder) -> JobRecord:
    (job,) = folder.jobs()
    return job


def test_a_job_whose_submission_was_not_answered_is_submitted_once(
    tmp_path: Path, pbs: Path
) -> None:
    folder, hub, login = begin(tmp_path / "l"), Told(), Forgetful(tmp_path / "l")
    (pbs / "full").touch()
    login.num_lost = 2
    launcher = make(folder, hub, login)
    launcher.step()
    assert only(folder).job_id is None
    assert "its endpoint was restarted" in only(folder).remark
    for _ in range(2):
        launcher.step()
    assert only(folder).job_id == "1.pbs"
    assert only(folder).remark == FULL
    assert len(list(pbs.glob("[0-9]*"))) == 1
    assert hub.expected["inst_1"] > 0


def test_the_beginning_of_a_name_is_enough_if_one_launch_has_it(tmp_path: Path) -> None:
    first, second = begin(tmp_path), begin(tmp_path)
    assert LaunchFolder.find(tmp_path, second.name).path == second.path
    with pytest.raises(RequestInvalid) as several:
        LaunchFolder.find(tmp_path, "l-")
    assert first.name in several.value.message
    assert second.name in several.value.message
    for unknown in ("", "x"):
        with pytest.raises(NotFound):
            LaunchFolder.find(tmp_path, unknown)


def test_whoever_begins_a_launch_waits_for_the_answer(tmp_path: Path, pbs: Path) -> None:
    folder, hub, login = begin(tmp_path / "l"), Told(), Forgetful(tmp_path / "l")
    (pbs / "full").touch()
    login.num_lost = 1
    make(folder, hub, login).begin()
    assert only(folder).job_id == "1.pbs"
    # Whoever watches it next submits nothing.
    make(folder, hub, login).step()
    assert (only(folder).job_id, hub.num_added) == ("1.pbs", 1)


@pytest.mark.parametrize(
    ("away", "root", "error"),
    [(True, "l", HubUnreachable), (False, "a l", SettingInvalid), (False, "l", LaunchImpossible)],
    ids=["no hub", "a path that scripts cannot hold", "no scheduler here"],
)
def test_a_launch_of_which_nothing_is_submitted_is_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    away: bool,
    root: str,
    error: type[FabricError],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder, hub = begin(tmp_path / root), Told(is_away=away)
    with pytest.raises(error) as caught:
        make(folder, hub, LocalLogin(tmp_path / root)).begin()
    record = folder.launch()
    assert record is not None
    assert (record.state, record.detail) == (InstanceState.FAILED, caught.value.message)
    assert not [job for job in folder.jobs() if job.open]
    assert len(hub.ended) == hub.num_added
    assert not list(folder.path.rglob("*.spec.json"))


def test_a_launch_that_nobody_answers_for_ends_with_the_reason(
    tmp_path: Path, pbs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, hub, login = begin(tmp_path / "l"), Told(), Forgetful(tmp_path / "l")
    (pbs / "full").touch()
    login.num_lost = MAX_STEPS
    monkeypatch.setattr(launcher_module, "BEGIN_S", 0.0)
    with pytest.raises(JobsFailing, match="its endpoint was restarted"):
        make(folder, hub, login).begin()
    assert only(folder).state is InstanceState.FAILED
    assert hub.ended == ["inst_1"]
    assert not list(folder.path.rglob("*.spec.json"))


def test_the_watch_is_handed_to_another_process_without_a_gap(tmp_path: Path) -> None:
    folder = begin(tmp_path / "l")
    with folder.watched() as lock:
        assert lock is not None
        with folder.watched() as second:
            assert second is None
        heir = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert folder.is_watched()
    heir.communicate(timeout=30)
    assert not folder.is_watched()


def test_a_job_that_was_never_answered_for_ends_with_the_launch(tmp_path: Path, pbs: Path) -> None:
    folder, hub, login = begin(tmp_path / "l"), Told(), Forgetful(tmp_path / "l")
    (pbs / "full").touch()
    login.num_lost = MAX_STEPS
    launcher = make(folder, hub, login)
    launcher.step()
    record = folder.launch()
    assert record is not None
    folder.write_launch(record.model_copy(update={"stop": True}))
    while launcher.step():
        pass
    job = only(folder)
    assert (job.state, job.job_id) == (InstanceState.STOPPED, None)
    assert hub.ended == ["inst_1"]
    # The job is still in the queue; it will find nothing to run.
    assert not list(folder.path.rglob("*.spec.json"))


def test_a_launch_whose_folder_was_deleted_ends_and_so_do_its_jobs(
    tmp_path: Path, pbs: Path
) -> None:
    (pbs / "full").touch()
    root, hub = tmp_path / "l", Told()
    folder = begin(root)
    launcher = make(folder, hub, LocalLogin(root))
    assert launcher.step()
    job_id = only(folder).job_id
    assert job_id is not None
    shutil.rmtree(folder.path)
    launcher.run()
    assert hub.ended == ["inst_1"]
    assert (pbs / job_id.split(".")[0] / "end").exists(), "it was not deleted from the queue"


def test_a_launch_goes_on_while_its_file_system_is_away(tmp_path: Path, pbs: Path) -> None:
    (pbs / "full").touch()
    root, hub = tmp_path / "l", Told()
    folder = begin(root)
    launcher = make(folder, hub, LocalLogin(root))
    assert launcher.step()
    root.rename(tmp_path / "away")
    assert not folder.is_deleted()
    (tmp_path / "away").rename(root)
    assert launcher.step()
    assert hub.ended == []


def test_what_a_job_took_is_told_once_though_the_hub_was_away(tmp_path: Path, pbs: Path) -> None:
    folder, hub = begin(tmp_path / "l"), Told(num_failures=2)
    launcher = make(folder, hub, LocalLogin(tmp_path / "l"))
    with pytest.raises(JobsFailing, match="exit status 0"):
        launcher.run()
    job = only(folder)
    assert job.ended_at is not None
    assert job.usage is not None
    [told] = hub.jobs
    assert told["job_id"] == job.job_id
    assert told["charge"] == pytest.approx(2.0 * job.usage.elapsed_s / 3600) != 0
    assert job.is_told


def test_a_launcher_that_comes_again_tells_what_is_left_and_submits_nothing(
    tmp_path: Path, pbs: Path
) -> None:
    folder, hub = begin(tmp_path / "l"), Told()
    record = folder.launch()
    assert record is not None
    now = datetime.now(UTC)
    folder.write_launch(record.model_copy(update={"ended_at": now}))
    fields = {
        "instance": "inst_1",
        "replica": 0,
        "generation": 0,
        "job_id": "1.pbs",
        "state": "stopped",
        "submitted_at": now,
        "started_at": now,
        "ended_at": now,
        "usage": {"elapsed_s": 90, "num_nodes": 1, "source": "qstat"},
        "charge": 0.05,
        "unit": "SU",
    }
    folder.write_job(JobRecord.model_validate(fields))
    for _ in range(2):
        make(folder, hub, LocalLogin(tmp_path / "l")).run()
    [told] = hub.jobs
    assert (told["launch"], told["charge"], told["account"]) == (folder.name, 0.05, "astro")
    assert hub.num_added == 0
