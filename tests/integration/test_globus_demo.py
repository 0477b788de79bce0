"""The demonstration over Globus Compute does what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_demo_over_globus_goes_from_nothing_to_the_bill(tmp_path: Path) -> None:
    environ = {**os.environ, "COLUMNS": "120", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "fabric.testing.globus.demo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    story, after = done.stdout.split("alpha dies")
    for way in ("HTTP", "SDK", "Parsl app", "Command line", "Raw Globus Compute call"):
        assert way in story
    assert "alpha: data is there" in story
    assert "The stream moved" in after
    assert "2 attempts" in after
    bill = after.split("The bill")[1]
    charged = [line for line in bill.splitlines() if "charge" in line and "run_" in line]
    assert len(charged) == 7, "five ways in, the stream that moved, and the question after it"
    assert not list(tmp_path.glob("fabric-demo-*")), "the demo cleans up after itself"
