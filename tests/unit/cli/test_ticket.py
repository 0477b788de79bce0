"""`fabric ticket` against a real hub, and times as people write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from fabric.cli.duration import DURATION
from fabric.cli.main import fabric
from fabric.testing.hub import RunningHub, running_hub

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_site("alpha")
        yield hub


@pytest.fixture
def run(hub: RunningHub, tmp_path: Path) -> Run:
    environ = {
        "FABRIC_BASE_URL": hub.base_url,
        "FABRIC_API_KEY": hub.api_key,
        "FABRIC_STATE_DIR": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    return lambda *words: CliRunner().invoke(fabric, ["ticket", *words], env=environ)


def test_a_ticket_is_printed_alone_and_once(hub: RunningHub, run: Run) -> None:
    done = run("--site", "alpha", "--ttl", "30m", "--max-su", "0.5")
    assert done.exit_code == 0, done.output
    ticket = done.stdout.strip()
    record = hub.keys.tickets.authenticate(ticket)
    assert record.max_usu == 500_000
    assert (record.expires_at - record.created_at).total_seconds() == 1800
    listed = run("--list")
    assert record.id in listed.stdout
    assert "0.500000" in listed.stdout
    assert ticket not in listed.output
    assert run("--revoke", record.id).exit_code == 0
    assert record.id not in run("--list").stdout
    assert run("--revoke", "0" * 12).exit_code == 3


def test_json_has_all_fields(run: Run) -> None:
    done = run("--site", "alpha", "--format", "json")
    assert json.loads(done.stdout)["ticket"].startswith("fabt_")
    assert [one["ticket"] for one in json.loads(run("--list", "--format", "json").stdout)] == [None]


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        ([], 2, "Give one of"),
        (["--site", "alpha", "--list"], 2, "Give one of"),
        (["--site", "gamma"], 3, "alpha"),
        (["--site", "alpha", "--ttl", "2d"], 3, "ttl_s"),
        (["--site", "alpha", "--ttl", "soon"], 2, "30m"),
        (["--site", "alpha", "--max-su", "0"], 3, "max_usu"),
    ],
)
def test_what_cannot_be_is_said(run: Run, words: list[str], exit_code: int, message: str) -> None:
    done = run(*words)
    assert done.exit_code == exit_code
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1d", 86_400)]
)
def test_a_time_is_seconds(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1w", "1h30m", "1e3", "٣h", "nan"])
def test_other_words_are_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter, match="30m"):
        DURATION.convert(text, None, None)
