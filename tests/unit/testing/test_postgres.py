"""The PostgreSQL of the tests is one's own, and ends with whoever started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from fabric.errors import SettingInvalid
from fabric.sql import Database
from fabric.testing.postgres import Postgres, running_postgres
from fabric.testing.processes import wait_ended


def test_nobody_gets_in_without_its_password(postgres: Postgres) -> None:
    _, _, rest = postgres.url().partition("@")
    with pytest.raises(SettingInvalid, match="password"):
        Database(f"postgresql://fabric:guessed@{rest}").open()


def test_it_leaves_no_process_and_no_file() -> None:
    with running_postgres() as server:
        pid = int((server.directory / "data/postmaster.pid").read_text().split()[0])
        left = [psutil.Process(pid), *psutil.Process(pid).children()]
        assert len(left) > 1
        database = Database(server.create("mine")).open()  # whoever is connected
    assert wait_ended(left, timeout_s=30) == []
    assert not server.directory.exists()
    database.close()


def test_it_ends_when_its_owner_is_killed() -> None:
    program = """
import sys, time
from pathlib import Path
from fabric.testing.postgres import Postgres
Postgres(directory=Path(sys.argv[1])).start()
print("up", flush=True)
time.sleep(600)
"""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        owner = subprocess.Popen(
            [sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True
        )
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        pid_file = (Path(folder) / "data/postmaster.pid").read_text().splitlines()
        server = psutil.Process(int(pid_file[0]))
        left = [server, *server.children()]
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
        assert wait_ended(left, timeout_s=60) == []
        # What a killed server leaves in the kernel, its next start would take away.
        subprocess.run(["ipcrm", "-m", pid_file[6].split()[1]], check=True)


def test_what_is_not_installed_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric.testing.postgres.INSTALLED", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SettingInvalid, match="apt-get install postgresql"), running_postgres():
        pass
