"""docs/programs.md runs as written, and says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fabric.artifacts import ArtifactSettings
from fabric.auth import PROGRAM_SCOPES
from fabric.broker.programs import MAX_DEVICE_S
from fabric.messages.program import MAX_CONSTS_BYTES, MAX_INLINE_BYTES
from fabric.programs import CAPS
from fabric.testing.commands import get_environ, read_blocks, run_blocks
from fabric.testing.hub import MODEL, PROJECT, running_hub

PAGE = Path(__file__).parents[2] / "docs/programs.md"
TEXT = PAGE.read_text()
ROWS = re.compile(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", re.M).findall(TEXT)
TIERS = ("interactive", "standard", "batch")


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=["alpha"]) as hub:
        database = f"sqlite:///{tmp_path / 'hub.sqlite'}"
        environ = get_environ(
            tmp_path, hub, FABRIC_HUB_DATABASE_URL=database, MODEL=MODEL, PROJECT=PROJECT
        )
        outputs = run_blocks(read_blocks(PAGE), environ, tmp_path)
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
