"""`fabric batch` against a real hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric.cli.main import fabric
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, RunningHub, running_hub

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path_factory.mktemp("hub"),
        sites=["alpha"],
        engine=lambda: FixedDelayEngine(token_s=0.01),
    ) as hub:
        yield hub


@pytest.fixture
def run(hub: RunningHub, tmp_path: Path) -> Run:
    environ = {
        "FABRIC_BASE_URL": hub.base_url,
        "FABRIC_API_KEY": hub.api_key,
        "FABRIC_STATE_DIR": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    return lambda *words: CliRunner().invoke(fabric, ["batch", *words], env=environ)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*custom_ids: str, max_tokens: int = 3) -> str:
        body = {"model": MODEL, "prompt": "one two", "max_tokens": max_tokens}
        lines = [
            {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
            for custom_id in custom_ids
        ]
        path = tmp_path / "requests.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return str(path)

    return write


def test_a_batch_is_submitted_watched_and_read(run: Run, write: Callable[..., str]) -> None:
    done = run("submit", write("a", "b"))
    assert done.exit_code == 0, done.output
    batch = done.stdout.strip()
    watched = run("status", batch, "--wait")
    assert "completed" in watched.stdout
    assert "2 of 2, 0 failed" in watched.stdout
    assert "0.000008 SU" in watched.stdout
    results = [json.loads(line) for line in run("results", batch).stdout.splitlines()]
    assert [result["custom_id"] for result in results] == ["a", "b"]
    assert batch in run("list").stdout
    [listed] = json.loads(run("list", "--limit", "1", "--format", "json").stdout)
    assert (listed["id"], listed["num_completed"]) == (batch, 2)
    over = run("cancel", batch)
    assert over.exit_code == 3
    assert "completed and cannot be cancelled" in over.stderr


def test_a_batch_is_cancelled(run: Run, write: Callable[..., str]) -> None:
    batch = run("submit", write("a", max_tokens=2000)).stdout.strip()
    assert run("cancel", batch).exit_code == 0
    assert "cancelled" in run("status", batch, "--wait").stdout
    [result] = [json.loads(line) for line in run("results", batch).stdout.splitlines()]
    assert result["error"]["code"] == "batch_cancelled"


def test_what_is_wrong_with_a_file_is_told(
    run: Run, write: Callable[..., str], tmp_path: Path
) -> None:
    done = run("submit", write("a", "a"), "--wait")
    assert done.exit_code == 0
    assert "failed" in done.stdout
    assert "line 2" in done.stdout
    (tmp_path / "notes.txt").write_text("hello\n")
    for name in ("notes.txt", "none"):
        done = run("submit", str(tmp_path / name))
        assert done.exit_code == 3
        assert name in done.stderr
    assert run("status", "batch_none").exit_code == 3
