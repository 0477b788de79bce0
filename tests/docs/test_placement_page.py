"""docs/placement.md runs as written, and its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fabric.broker.policies import POLICIES
from fabric.testing.commands import get_environ, read_blocks
from fabric.testing.hub import MODEL, running_hub

PAGE = Path(__file__).parents[2] / "docs/placement.md"
TEXT = PAGE.read_text()


def test_the_policies_are_those_of_the_broker() -> None:
    parts = ("queue", "service", "data", "price", "risk")
    rows = re.findall(r"^\| `([a-z-]+)`(?: \(default\))? \|((?: [\d.]+ \|)+)$", TEXT, re.M)
    told = {
        name: dict(zip(parts, map(float, re.findall(r"[\d.]+", row)), strict=True))
        for name, row in rows
    }
    assert told == POLICIES


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        environ = get_environ(
            tmp_path,
            hub,
            FABRIC_HUB_DATABASE_URL=f"sqlite:///{tmp_path / 'hub.sqlite'}",
            COLUMNS="200",
            MODEL=MODEL,
        )
        ran = [block.run(environ, tmp_path) for block in read_blocks(PAGE)]
        told = [one.stdout + one.stderr for one in ran]
        explained, limited, planned = told
        assert "TOTAL S" in explained
        assert "alpha: data is there" in explained
        assert "site alpha was changed" in limited
        assert planned.count("2038-01-11 08:00") >= 3
        assert "new disks" in planned
        rules = hub.catalog.get_site("alpha").rules
        assert (rules.max_in_flight, rules.maintenance) == (64, ())


def test_page_is_short() -> None:
    assert len(TEXT.split()) <= 1200
