"""Every command of docs/site-admin.md runs, in order: a hub, its site, and an endpoint of the rig's
service."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.testing.commands import get_environ, read_blocks
from fabric.testing.globus import Globus

PAGE = Path(__file__).parents[2] / "docs/site-admin.md"


@pytest.fixture
def environ(globus: Globus, tmp_path: Path, free_port: int) -> Iterator[dict[str, str]]:
    own = {
        "GLOBUS_COMPUTE_USER_DIR": str(tmp_path / "compute"),
        "FABRIC_HUB_PORT": str(free_port),
        "FABRIC_BASE_URL": f"http://127.0.0.1:{free_port}",
    }
    environ = get_environ(tmp_path, **globus.environ("site-a") | own)
    yield environ
    for name in ("agent.pid", "hub.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((tmp_path / name).read_text()), signal.SIGTERM)
    stop = ["globus-compute-endpoint", "stop", "anvil"]
    subprocess.run(stop, env=environ, capture_output=True, check=False, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_page_runs_as_written(environ: dict[str, str], tmp_path: Path) -> None:
    outputs = []
    for block in read_blocks(PAGE):
        try:
            done = block.run(environ, tmp_path, timeout_s=400)
        except AssertionError as error:
            logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
            raise AssertionError(f"{error}\n{logs}") from None
        outputs.append(done.stdout + done.stderr)
    everything = "\n".join(outputs)
    assert "The project astro would be added." in everything
    assert "fabric-admin model add smollm2-135m-instruct" in everything
    assert "the hub takes it as the agent's of here" in everything
    assert "SU" in everything
    assert "3 of 3 files" in everything
    assert re.search(r"Its id is [0-9a-f-]{36}", everything)
    assert "is online" in everything
    assert "Traceback" not in everything


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 1000
