import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from fabric.launch.guard import get_guarded

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def owner():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def start(owner_pid: int) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    guard = subprocess.Popen(get_guarded(SLEEPER, owner_pid), stdout=subprocess.PIPE)
    assert guard.stdout.readline() == b"up\n"
    return guard, psutil.Process(guard.pid).children()[0]


def test_guarded_command_ends_when_its_owner_is_killed(owner) -> None:
    guard, command = start(owner.pid)
    with guard:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert psutil.wait_procs([command], timeout=20)[1] == []
        assert guard.wait(20) != 0


def test_guard_passes_sigterm_on_and_never_touches_its_owners_group() -> None:
    guard, command = start(os.getpid())
    with guard:
        assert os.getpgid(guard.pid) != os.getpgrp()
        guard.terminate()
        assert guard.wait(20) != 0
        assert not command.is_running()


def test_what_the_command_leaves_behind_ends_with_it() -> None:
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid)"
    argv = get_guarded([sys.executable, "-c", script])
    answer = subprocess.run(argv, stdout=subprocess.PIPE, timeout=10)
    assert answer.returncode == 0
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(answer.stdout)).status() == psutil.STATUS_ZOMBIE


def test_guard_of_an_owner_that_is_gone_starts_nothing(owner) -> None:
    owner.kill()
    owner.wait()
    answer = subprocess.run(get_guarded(SLEEPER, owner.pid), capture_output=True, timeout=10)
    assert (answer.returncode, answer.stdout) == (1, b"")


def test_guard_returns_the_commands_exit_code() -> None:
    assert (
        subprocess.run(get_guarded([sys.executable, "-c", "exit(7)"]), timeout=10).returncode == 7
    )
