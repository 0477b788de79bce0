"""An endpoint's files are installed whole, and nobody's edits are lost."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest

from fabric.compute.endpoint_install import (
    get_endpoint_directory,
    install,
    plan_install,
    read_endpoint_id,
)
from fabric.config import ComputeExecutor, SiteSpec
from fabric.errors import FilesForeign, SettingInvalid

FILES = {"config.yaml": "a: 1\n", "user_config_schema.json": "{}\n"}
ENDPOINT_ID = UUID("4b116d3c-1703-4f8f-9f6f-39921e5864df")


def test_files_are_written_for_their_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "gc" / "here"
    assert [change.name for change in install(directory, FILES)] == list(FILES)
    assert {name: (directory / name).read_text() for name in FILES} == FILES
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "config.yaml").stat().st_mode & 0o077 == 0
    assert install(directory, FILES) == []


def test_own_older_files_are_replaced_and_kept(tmp_path: Path) -> None:
    install(tmp_path, FILES)
    install(tmp_path, {**FILES, "config.yaml": "a: 2\n"})
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"
    assert (tmp_path / "config.yaml.bak").read_text() == "a: 1\n"
    install(tmp_path, FILES)
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize("known", [False, True])
def test_somebody_elses_edit_is_kept_unless_forced(tmp_path: Path, known: bool) -> None:
    if known:
        install(tmp_path, FILES)
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(FilesForeign, match=r"config\.yaml.*--dry-run.*--force"):
        install(tmp_path, {**FILES, "user_config_schema.json": "[]\n"})
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"
    assert (tmp_path / "user_config_schema.json").exists() == known
    (change,) = [each for each in plan_install(tmp_path, FILES) if each.foreign]
    assert "-mine: true\n+a: 1\n" in change.diff()
    install(tmp_path, FILES, force=True)
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "config.yaml.bak").read_text() == "mine: true\n"


def test_killed_install_is_finished_by_the_next(tmp_path: Path) -> None:
    kill_at_second_file = (
        "import os, sys, pathlib\n"
        "from fabric.compute.endpoint_install import install\n"
        "def watch(event, args):\n"
        "    if event == 'os.rename' and str(args[1]).endswith('schema.json'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(watch)\n"
        f"install(pathlib.Path({str(tmp_path)!r}), {FILES!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", kill_at_second_file], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "config.yaml").read_text() == FILES["config.yaml"]
    assert not (tmp_path / "user_config_schema.json").exists()
    other = {"config.yaml": "a: 3\n", "user_config_schema.json": "[]\n"}
    install(tmp_path, other)
    assert {name: (tmp_path / name).read_text() for name in other} == other


def test_two_installs_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    sets = [{name: f"{text}{turn}" for name, text in FILES.items()} for turn in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: install(tmp_path, each), sets))
    assert {name: (tmp_path / name).read_text() for name in FILES} in sets
    assert plan_install(tmp_path, FILES)[0].foreign is False


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a file")
    with pytest.raises(SettingInvalid, match=r"endpoint directory.*here"):
        install(tmp_path / "here", FILES)


@pytest.mark.parametrize("name", ["", "../up", "/abs", ".hidden", "a b", "a'b", "x" * 65])
def test_endpoint_name_cannot_leave_its_directory(name: str) -> None:
    with pytest.raises(SettingInvalid, match="--name"):
        get_endpoint_directory(name)


def test_endpoint_directory_follows_globus_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(tmp_path))
    assert get_endpoint_directory("here") == tmp_path / "here"


def test_id_of_another_endpoint_is_refused(tmp_path: Path) -> None:
    site = SiteSpec(name="here")
    assert read_endpoint_id(tmp_path, site) is None
    (tmp_path / "endpoint.json").write_text(f'{{"endpoint_id": "{ENDPOINT_ID}"}}')
    assert read_endpoint_id(tmp_path, site) == ENDPOINT_ID
    executor = ComputeExecutor(kind="globus-compute", endpoint_id=UUID(int=1))
    with pytest.raises(SettingInvalid, match=str(ENDPOINT_ID)):
        read_endpoint_id(tmp_path, SiteSpec(name="here", executor=executor))
    (tmp_path / "endpoint.json").write_text("{")
    with pytest.raises(SettingInvalid, match="endpoint directory"):
        read_endpoint_id(tmp_path, site)
