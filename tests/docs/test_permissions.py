"""Every command of docs/permissions.md runs, in order, and does what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from fabric.auth import MODES, Grants, Limit
from fabric.cli.main import fabric_admin
from fabric.sql import Database

PAGE = Path(__file__).parents[2] / "docs/permissions.md"
BLOCKS = re.compile(r"^```console\n(.*?)^```$", re.M | re.S).findall(PAGE.read_text())
COMMANDS = [line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines()]


def test_page_runs_as_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    environ: dict[str, str | None] = {
        **{name: None for name in os.environ if name.startswith("FABRIC_")},
        "FABRIC_HUB_DATABASE_URL": url,
        "FABRIC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }

    def run(command: str) -> str:
        program, *args = shlex.split(command)
        assert program == "fabric-admin"
        done = CliRunner().invoke(fabric_admin, args, env=environ)
        assert done.exit_code == 0, f"{command}\n{done.stderr}"
        return done.stdout

    printed = {command: run(command) for command in COMMANDS}
    with Database(url) as database:
        grants = Grants(database)
        assert grants.private() == [("model", "llama-70b"), ("site", "anvil")]
        assert len(grants.grants()) == 4
        assert grants.limits("project:astro") == [
            Limit(
                subject="project:astro",
                requests_per_min=2000,
                tokens_per_min=1_000_000,
                max_concurrent=64,
            )
        ]
    assert "user:alice@example.edu" in printed["fabric-admin grant show"]
    [entry] = json.loads(printed["fabric-admin audit show --limit 1 --format json"])
    assert entry["what"] == "limit modify"
    assert [row["tokens_per_min"] for row in entry["after"]] == [1_000_000]
    noted = printed["fabric-admin audit verify"].strip()
    assert run(f"fabric-admin audit verify --noted {noted}").strip() == noted


def test_page_tells_of_all_modes() -> None:
    told = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.M)
    assert sorted(re.findall(r"`([a-z-]+)`", " ".join(told))) == sorted(MODES)


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 700
