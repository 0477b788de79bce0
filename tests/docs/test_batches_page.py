"""docs/batches.md runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.sdk import Fabric
from fabric.testing.hub import MODEL, running_hub, wait_until

PAGE = Path(__file__).parents[2] / "docs/batches.md"
BLOCKS = re.compile(r"^```(console|python)\n(.*?)^```$", re.M | re.S).findall(PAGE.read_text())


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub, Fabric(hub.base_url, hub.api_key) as fabric:
        environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": hub.api_key,
            "FABRIC_STATE_DIR": str(tmp_path / "state"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "OPENAI_BASE_URL": hub.openai_url,
            "OPENAI_API_KEY": hub.api_key,
            "MODEL": MODEL,
        }
        outputs = []
        for language, text in BLOCKS:
            script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
            argv = ["bash", "-euo", "pipefail", "-c", script]
            if language == "python":
                argv = [sys.executable, "-c", text]
            done = subprocess.run(
                argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout)
        assert "3 of 3, 0 failed" in outputs[1]
        assert all(f'"custom_id": "q{number}"' in outputs[1] for number in (1, 2, 3))
        assert "word0 word1" in outputs[1]
        wait_until(lambda: all(one.is_over for one in fabric.batches()), timeout_s=60)
        assert [one.num_completed for one in fabric.batches()] == [3, 3]


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 250
