"""docs/programs.md runs as written, and says what the code does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.artifacts import ArtifactSettings
from fabric.auth import PROGRAM_SCOPES
from fabric.broker.programs import MAX_DEVICE_S
from fabric.messages.program import MAX_CONSTS_BYTES, MAX_INLINE_BYTES
from fabric.programs import CAPS
from fabric.testing.hub import MODEL, PROJECT, running_hub

PAGE = Path(__file__).parents[2] / "docs/programs.md"
TEXT = PAGE.read_text()
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S).findall(TEXT)
ROWS = re.compile(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", re.M).findall(TEXT)
TIERS = ("interactive", "standard", "batch")


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=["alpha"]) as hub:
        environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_HUB_DATABASE_URL": f"sqlite:///{tmp_path / 'hub.sqlite'}",
            "FABRIC_STATE_DIR": str(tmp_path / "state"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "MODEL": MODEL,
            "PROJECT": PROJECT,
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
    assert "layers.{i}.out" in (tmp_path / "points.json").read_text()
    assert re.fullmatch(r"\['h'\] \d+ word0 word1 word2\n", outputs[2])
    assert json.loads((tmp_path / "artifact.json").read_text())["handle"]["artifact"]


def test_the_caps_are_those_of_the_page() -> None:
    shown = {name: [_number(cell) for cell in cells] for name, *cells in ROWS if name != "cap"}
    assert shown["device seconds"] == [MAX_DEVICE_S[tier] for tier in TIERS]
    for name, field in (
        ("saved bytes", "result_bytes"),
        ("nodes", "nodes"),
        ("generated tokens", "generated_tokens"),
    ):
        assert shown[name] == [getattr(CAPS[tier], field) for tier in TIERS]
    assert MAX_INLINE_BYTES == 4 * 2**20
    assert MAX_CONSTS_BYTES == 64 * 2**20
    assert ArtifactSettings().ttl_s == 86_400


def test_every_scope_is_on_the_page() -> None:
    assert all(f"`{scope}`" in TEXT for scope in PROGRAM_SCOPES)


def _number(cell: str) -> int:
    if "-" in cell:
        return 0
    number, _, unit = cell.replace(",", "").partition(" ")
    return int(number) * {"": 1, "MiB": 2**20, "GiB": 2**30}[unit]
