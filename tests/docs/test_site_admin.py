"""Every command of docs/site-admin.md runs, in order, at an endpoint of the rig's service."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.testing.globus import Globus

PAGE = Path(__file__).parents[2] / "docs/site-admin.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_page_runs_as_written(globus: Globus, tmp_path: Path) -> None:
    environ = {
        **os.environ,
        **globus.environ("site-a"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GLOBUS_COMPUTE_USER_DIR": str(tmp_path / "compute"),
    }
    outputs = []
    try:
        for text in BLOCK.findall(PAGE.read_text()):
            script = re.sub(r"^\$ ", "", text, flags=re.M)
            argv = ["bash", "-euo", "pipefail", "-c", script]
            done = subprocess.run(
                argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout + done.stderr)
    finally:
        stop = ["globus-compute-endpoint", "stop", "anvil"]
        subprocess.run(stop, env=environ, capture_output=True, check=False, timeout=60)
    everything = "\n".join(outputs)
    assert "3 of 3 files" in everything
    assert re.search(r"Its id is [0-9a-f-]{36}", everything)
    assert "Traceback" not in everything


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 450
