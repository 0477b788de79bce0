"""Instances started, described and stopped by the registered functions' own source."""

import json
import os
import stat
from pathlib import Path

import psutil
import pytest

from fabric.errors import AlreadyStarted, RequestInvalid, SettingInvalid
from fabric.launch.onsite import parse_gpus
from fabric.messages import InstanceSpec
from fabric.testing.processes import wait_ended
from fabric.testing.rig import get_spec

END_S = 60.0


@pytest.fixture
def spec(tmp_path: Path) -> InstanceSpec:
    return get_spec(tmp_path, model="fixed@1")


def to_json(spec: InstanceSpec) -> dict[str, object]:
    return spec.model_dump(mode="json", exclude={"status_path"})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_instance_runs_until_it_is_stopped(site, spec) -> None:
    ended = site.start(spec)
    described = site.wait_ready(spec.launch.instance)
    assert described["hello"]["model"] == "fixed@1"
    assert described["load"]["num_running"] == 0
    stopped = site.call("stop_instance", spec.launch.instance)
    assert stopped["stopped"] is True
    result = ended.result(END_S)
    assert result["exit_code"] == 0
    assert (result["instance"], result["detail"]) == (spec.launch.instance, "drained")
    assert site.call("describe_site")["instances"] == []
    assert site.call("stop_instance", spec.launch.instance)["stopped"] is False


def test_what_it_keeps_is_its_owners_alone_and_shows_no_secret(site, spec) -> None:
    site.start_ready(spec)
    assert mode(site.instances) == 0o700
    files = list(site.instances.iterdir())
    assert {path.suffix for path in files} == {".json", ".log", ".place"}
    assert all(mode(path) == 0o600 for path in files)
    guest_token = json.loads((site.instances / f"{spec.launch.instance}.json").read_text())[
        "guest_token"
    ]
    assert guest_token
    described = json.dumps(site.call("describe_site"))
    for secret in (guest_token, spec.direct_token, spec.launch.token):
        assert secret not in described
    kept = "".join(path.read_text() for path in files)
    assert spec.direct_token not in kept
    assert spec.launch.token not in kept


def test_the_machine_is_described(site, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    described = site.call("describe_site")
    assert described["cpus"] == len(os.sched_getaffinity(0))
    assert described["memory_bytes"] == psutil.virtual_memory().total
    assert described["job_id"] == "4711"
    assert described["run_dir"] == site.run_dir
    assert isinstance(described["gpus"], list)


def test_the_drivers_table_of_gpus_is_understood() -> None:
    table = "NVIDIA H200, 143771\nNVIDIA GB10, [N/A]\n"
    assert parse_gpus(table) == [
        {"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20},
        {"name": "NVIDIA GB10", "memory_bytes": None},
    ]


def test_the_schedulers_job_is_in_the_result(site, spec, monkeypatch) -> None:
    monkeypatch.setenv("PBS_JOBID", "12.pbs-01")
    ended = site.start(spec)
    assert site.wait_ready(spec.launch.instance)["job_id"] == "12.pbs-01"
    site.call("stop_instance", spec.launch.instance)
    assert ended.result(END_S)["job_id"] == "12.pbs-01"


def test_an_instance_that_does_not_load_says_why(site, tmp_path) -> None:
    broken = get_spec(tmp_path, engine="broken=1")
    result = site.start(broken).result(END_S)
    assert result["exit_code"] == 1
    assert "cannot be loaded: it was told so" in result["detail"]
    assert "cannot be loaded: it was told so" in result["log_tail"]


def test_a_module_that_does_not_run_says_why(site, spec, monkeypatch) -> None:
    monkeypatch.setenv("FABRIC_INSTANCE_MODULE", "fabric.no_such_module")
    result = site.start(spec).result(END_S)
    assert result["exit_code"] == 1
    assert "No module named" in result["log_tail"]
    monkeypatch.setenv("FABRIC_INSTANCE_MODULE", "os; import sys")
    with pytest.raises(SettingInvalid, match="not a module's name"):
        site.call("start_instance", to_json(spec))


def test_an_instance_is_started_once(site, spec) -> None:
    ended = site.start(spec)
    site.wait_ready(spec.launch.instance)
    with pytest.raises(AlreadyStarted, match=spec.launch.instance):
        site.call("start_instance", to_json(spec))
    assert site.wait_ready(spec.launch.instance), "the first is not disturbed"
    site.call("stop_instance", spec.launch.instance)
    ended.result(END_S)
    with pytest.raises(AlreadyStarted):
        site.call("start_instance", to_json(spec))


def test_two_starts_at_once_run_one_instance(site, spec) -> None:
    starts = [site.start(spec) for _ in range(4)]
    site.wait_ready(spec.launch.instance)
    site.call("stop_instance", spec.launch.instance)
    errors = [start.exception(END_S) for start in starts]
    assert sorted(type(error).__name__ for error in errors if error) == ["AlreadyStarted"] * 3


def test_an_instance_ends_with_its_worker_and_its_files_go(site, spec) -> None:
    with site.worker("start_instance", to_json(spec)) as worker:
        described = site.wait_ready(spec.launch.instance)
        instance = psutil.Process(described["pid"])
        assert instance.ppid() == worker.pid
        worker.kill()
        assert wait_ended([instance], timeout_s=20) == []
    assert site.call("describe_site")["instances"] == []
    assert {path.suffix for path in site.instances.iterdir()} <= {".log", ".json"}
    assert site.call("stop_instance", spec.launch.instance)["stopped"] is False


def test_an_instance_of_another_machine_is_kept_and_asked_to_stop(site, spec) -> None:
    ended = site.start(spec)
    site.wait_ready(spec.launch.instance)
    path = site.instances / f"{spec.launch.instance}.place"
    place = json.loads(path.read_text()) | {"host": "another", "pid": 2**22 + 1}
    path.write_text(json.dumps(place))
    (described,) = site.call("describe_site")["instances"]
    assert (described["host"], described["hello"]) == ("another", None)
    assert site.call("stop_instance", spec.launch.instance)["stopped"] is True
    assert ended.result(END_S)["exit_code"] == 0


@pytest.mark.parametrize("field", ["launch", "direct_token"])
def test_a_spec_that_lacks_something_is_refused_without_its_secrets(site, spec, field) -> None:
    broken = to_json(spec)
    del broken[field]
    with pytest.raises(RequestInvalid, match=f"spec.{field}") as refused:
        site.call("start_instance", broken)
    assert spec.launch.token not in str(refused.value)
    assert not site.instances.parent.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"status_path": "/tmp/elsewhere.json"},
        {"module": "os"},
        {"launch": {"instance": "../../escape"}},
        {"launch": {"instance": ""}},
        {"launch": {"instance": "a/b"}},
        {"launch": {"instance": 7}},
    ],
)
def test_a_spec_that_reaches_outside_is_refused(site, spec, change) -> None:
    fields = to_json(spec)
    fields |= {**change, "launch": {**fields["launch"], **change.get("launch", {})}}
    with pytest.raises(RequestInvalid):
        site.call("start_instance", fields)
    assert not site.instances.parent.exists()


@pytest.mark.parametrize(
    "run_dir", ["", "relative", "./x", "/tmp/../etc", "~/../other", "/tmp/a\nb", "/a\0b", 7]
)
def test_a_run_dir_that_is_no_safe_path_is_refused(site, run_dir) -> None:
    site.run_dir = run_dir
    for name, arguments in (("describe_site", ()), ("stop_instance", ("inst_1",))):
        with pytest.raises(RequestInvalid, match="run_dir"):
            site.call(name, *arguments)


def test_a_directory_that_is_open_to_others_is_closed(site, spec) -> None:
    site.instances.mkdir(parents=True)
    site.instances.chmod(0o777)
    site.start_ready(spec)
    assert mode(site.instances) == 0o700


def test_a_directory_that_is_a_link_is_refused(site, spec, tmp_path) -> None:
    site.instances.parent.mkdir()
    site.instances.symlink_to(tmp_path)
    with pytest.raises(SettingInvalid, match="link"):
        site.call("start_instance", to_json(spec))


def test_a_run_dir_that_is_a_file_is_told(site, spec) -> None:
    site.instances.parent.write_text("")
    with pytest.raises(SettingInvalid, match="run_dir"):
        site.call("start_instance", to_json(spec))


def test_files_that_make_no_sense_are_no_instances(site, spec) -> None:
    site.start_ready(spec)
    (site.instances / "inst_torn.place").write_text('{"host": "he')
    (site.instances / "inst_empty.place").write_text("")
    (site.instances / f"{spec.launch.instance}.json").write_text("{")
    (described,) = site.call("describe_site")["instances"]
    assert (described["instance"], described["state"]) == (spec.launch.instance, "starting")
