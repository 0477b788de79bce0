"""Every command of docs/login.md runs, in order, with a Globus Auth of this machine."""

import os
import re
import sys
from pathlib import Path

import pytest

from fabric.auth import Users
from fabric.config import load_settings
from fabric.testing.globus.campus import running_campus
from fabric.testing.hub import running_hub
from fabric.testing.terminal import Terminal

PAGE = Path(__file__).parents[2] / "docs/login.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
COMMANDS = [
    line.removeprefix("$ ")
    for language, text in BLOCKS
    if language == "console"
    for line in text.splitlines()
]
[CONFIG] = [text for language, text in BLOCKS if language == "yaml"]


@pytest.mark.slow
def test_login_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_campus() as campus:
        for name, value in campus.service.environ.items():
            monkeypatch.setenv(name, value)
        with running_hub(
            tmp_path,
            tokens=lambda database: campus.get_tokens(campus.add_groups(database), Users(database)),
        ) as hub:
            hub.ledger.grant(hub.ledger.open_allocation("astro", "*"), 10**9)
            environ = {
                **{name: v for name, v in os.environ.items() if not name.startswith("FABRIC_")},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "FABRIC_BASE_URL": hub.base_url,
                "FABRIC_GLOBUS_HUB_CLIENT_ID": campus.hub.id,
                "FABRIC_GLOBUS_CLIENT_ID": campus.app.id,
                "FABRIC_HUB_DATABASE_URL": f"sqlite:///{tmp_path / 'admin.db'}",
                "FABRIC_STATE_DIR": str(tmp_path / "state"),
                "XDG_CONFIG_HOME": str(tmp_path / "config"),
                "GROUP": campus.survey.id,
                "COLUMNS": "1000",
            }
            seen = ""
            for command in COMMANDS:
                terminal = Terminal(environ, "bash", "-c", command)
                if command.startswith("fabric login"):
                    page = terminal.read_until("Code: ", 60)
                    [url] = re.findall(r"http://\S+/v2/oauth2/authorize\S+", page)
                    terminal.type(campus.service.browse(url, campus.alice) + "\n")
                assert terminal.finish() == 0, f"{command}\n{terminal.seen}"
                seen += terminal.seen
    assert seen.count("alice@example.edu") >= 3
    assert "word0 word1" in seen
    assert campus.survey.id in seen


def test_login_page_names_settings_that_exist(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    client = load_settings(environ={}, user_path=path).client
    assert client.base_url == "https://hub.example.edu"
    assert client.globus_hub_client_id
    assert client.globus_client_id


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 350
