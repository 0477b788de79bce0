"""Every command in a console block of docs/sites.md runs, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/sites.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_page_runs_as_written(tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    environ.pop("XDG_CONFIG_HOME", None)
    script = "".join(
        re.sub(r"^\$ ", "", text, flags=re.M) for text in BLOCK.findall(PAGE.read_text())
    )
    argv = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^lab +ok .*endpoint rendered$", done.stdout, re.M)
    assert re.search(r"^alcf-polaris +ok ", done.stdout, re.M)


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 500
