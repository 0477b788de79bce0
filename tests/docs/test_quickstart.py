"""Every block of docs/quickstart.md runs, in order, against a real federation; README's too."""

import subprocess
from pathlib import Path

import pytest

from fabric.testing.commands import get_environ, read_blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quickstart.md"
README = ROOT / "README.md"
*BEFORE, LAST = read_blocks(PAGE)
FROM_README = [block for block in read_blocks(README) if block.language == "python"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_quickstart_runs_as_written(tmp_path: Path, free_port: int) -> None:
    environ = get_environ(tmp_path, FABRIC_HUB_PORT=str(free_port))
    try:
        ran = [
            block.run(environ, tmp_path, timeout_s=240) for block in (*BEFORE, *FROM_README, LAST)
        ]
    finally:
        subprocess.run(
            ["fabric", "down"], env=environ, capture_output=True, check=False, timeout=60
        )
    everything = "\n".join(one.stdout + one.stderr for one in ran)
    assert "alpha" in everything
    assert "beta" in everything
    assert "Paris" in everything
    assert "Traceback" not in everything


def test_pages_are_short() -> None:
    assert len(PAGE.read_text().split()) <= 800
    assert len(README.read_text().split()) <= 550
