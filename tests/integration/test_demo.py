"""The demonstration does what it says, and a hub that cannot start says why."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_goes_from_nothing_to_the_bill(tmp_path: Path) -> None:
    environ = {**os.environ, "COLUMNS": "120", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [BIN / "fabric", "demo"], capture_output=True, text=True, env=environ, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for way in ("HTTP", "SDK", "Parsl app", "Command line"):
        assert way in done.stdout
    story, after = done.stdout.split("alpha dies")
    assert "alpha: data is there" in story
    assert "The stream moved" in after
    assert "2 attempts" in after
    bill = after.split("The bill")[1]
    charged = [line for line in bill.splitlines() if "charge" in line and "run_" in line]
    assert len(charged) == 6, "four ways in, the stream that moved, and the question after it"
    assert not list(tmp_path.glob("fabric-demo-*")), "the demo cleans up after itself"


def test_second_hub_on_a_port_is_refused(tmp_path: Path, free_port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        done = subprocess.run(
            [
                *(BIN / "fabric-admin", "hub", "--state-dir", tmp_path / "state"),
                *("--port", str(free_port)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 3
    assert f"Port {free_port} on 127.0.0.1 is in use" in done.stderr
    assert "--port" in done.stderr


def test_hub_without_keys_stays_on_loopback(tmp_path: Path, free_port: int) -> None:
    done = subprocess.run(
        [
            *(BIN / "fabric-admin", "hub", "--state-dir", tmp_path / "state"),
            *("--host", "0.0.0.0", "--port", str(free_port)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert "has no key yet" in done.stderr
    assert "fabric-admin key add" in done.stderr
