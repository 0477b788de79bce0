"""What a killed leader leaves in its session is ended, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LEADER = """
import os, subprocess, sys
reaper = [sys.executable, "-m", "fabric.launch.reaper", str(os.getpid()), *sys.argv[1:]]
subprocess.run(reaper, check=True)
child = subprocess.Popen([sys.executable, "-c", "import os, subprocess, time; "
    "os.setpgid(0, 0); print(subprocess.Popen(['sleep', '600']).pid, flush=True); "
    "time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def wait_gone(pid: int, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def bystander() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        assert process.poll() is None
        process.kill()


def test_killed_leader_takes_its_session_and_its_pid_file_along(
    bystander: int, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEADER, str(tmp_path)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    ) as leader:
        pid_file = tmp_path / "daemon.pid"
        pid_file.write_text(f"{leader.pid}\n")
        assert leader.stdout is not None
        pids = [int(leader.stdout.readline()) for _ in range(2)]
        os.kill(leader.pid, signal.SIGKILL)
        assert all(wait_gone(pid) for pid in pids)
        deadline = time.monotonic() + 30
        while pid_file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not pid_file.exists()


def test_process_that_has_ended_is_not_watched() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    argv = [sys.executable, "-m", "fabric.launch.reaper", str(ended.pid)]
    done = subprocess.run(argv, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert str(ended.pid) in done.stderr
