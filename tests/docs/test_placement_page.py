"""docs/placement.md runs as written, and its tables are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.broker.policies import POLICIES
from fabric.testing.hub import MODEL, running_hub

PAGE = (Path(__file__).parents[2] / "docs/placement.md").read_text()
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


def test_the_policies_are_those_of_the_broker() -> None:
    parts = ("queue", "service", "data", "price", "risk")
    rows = re.findall(r"^\| `([a-z-]+)`(?: \(default\))? \|((?: [\d.]+ \|)+)$", PAGE, re.M)
    told = {
        name: dict(zip(parts, map(float, re.findall(r"[\d.]+", row)), strict=True))
        for name, row in rows
    }
    assert told == POLICIES


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": hub.api_key,
            "FABRIC_STATE_DIR": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "FABRIC_HUB_DATABASE_URL": f"sqlite:///{tmp_path / 'hub.sqlite'}",
            "COLUMNS": "200",
            "MODEL": MODEL,
        }
        told = []
        for text in BLOCK.findall(PAGE):
            script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
            argv = ["bash", "-euo", "pipefail", "-c", script]
            done = subprocess.run(
                argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            told.append(done.stdout + done.stderr)
        explained, limited, planned = told
        assert "TOTAL S" in explained
        assert "alpha: data is there" in explained
        assert "site alpha was changed" in limited
        assert planned.count("2038-01-11 08:00") >= 3
        assert "new disks" in planned
        rules = hub.catalog.get_site("alpha").rules
        assert (rules.max_in_flight, rules.maintenance) == (64, ())


def test_page_is_short() -> None:
    assert len(PAGE.split()) <= 1200
