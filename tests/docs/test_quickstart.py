"""Every block of docs/quickstart.md runs, in order, against a real federation; README's too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quickstart.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.M | re.S)
*BEFORE, LAST = BLOCK.findall(PAGE.read_text())
FROM_README = [block for block in BLOCK.findall(README.read_text()) if block[0] == "python"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_quickstart_runs_as_written(tmp_path: Path, free_port: int) -> None:
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FABRIC_STATE_DIR": str(tmp_path / "state"),
        "FABRIC_HUB_PORT": str(free_port),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    outputs = []
    try:
        for language, text in [*BEFORE, *FROM_README, LAST]:
            if language == "console":
                script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
                argv = ["bash", "-euo", "pipefail", "-c", script]
            else:
                argv = [sys.executable, "-c", text]
            done = subprocess.run(
                argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout + done.stderr)
    finally:
        subprocess.run(
            ["fabric", "down"], env=environ, capture_output=True, check=False, timeout=60
        )
    everything = "\n".join(outputs)
    assert "alpha" in everything
    assert "beta" in everything
    assert "Paris" in everything
    assert "Traceback" not in everything


def test_pages_are_short() -> None:
    assert len(PAGE.read_text().split()) <= 800
    assert len(README.read_text().split()) <= 550
