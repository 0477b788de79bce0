"""`fabric estimate` and `fabric top` against a real hub, as they are printed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric.cli.commands.estimate import CountType, span
from fabric.cli.main import fabric
from fabric.sdk import Fabric
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.terminal import Terminal

Run = Callable[..., Result]
SIZE = ("--requests", "1e6", "--prompt-tokens", "800", "--output-tokens", "100")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        with Fabric(hub.base_url, hub.api_key) as client:
            for _ in range(24):
                client.complete("one two", max_tokens=4)
        wait_until(
            lambda: [run.state for run in hub.catalog.runs(PROJECT)] == ["completed"] * 24,
            timeout_s=60,
        )
        yield hub


@pytest.fixture
def environ(hub: RunningHub, tmp_path: Path) -> dict[str, str]:
    return {
        "FABRIC_BASE_URL": hub.base_url,
        "FABRIC_API_KEY": hub.api_key,
        "FABRIC_STATE_DIR": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    return lambda *words: CliRunner().invoke(fabric, words, env=environ)


def test_an_estimate_fits_a_terminal_and_says_what_it_costs(run: Run) -> None:
    done = run("estimate", *SIZE)
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    title, heads, alpha, beta, total = done.stdout.splitlines()
    assert title == "1,000,000 requests of 800 and 100 tokens to fixed@1, batch"
    assert heads.split() == ["SITE", "ROWS", "REQ/S", "10%", "50%", "90%", "SU", "AVAILABLE"]
    assert [line.split()[0] for line in (alpha, beta, total)] == ["alpha", "beta", "all"]
    # A million times 800 prompt tokens at 1 micro-SU and 100 output tokens at 2, half of it as
    # batch work.
    assert "500.00" in alpha
    assert "1,000,000.00" in alpha


def test_an_estimate_in_json_has_what_a_program_needs(run: Run) -> None:
    done = run("estimate", *SIZE, "--site", "beta", "--tier", "standard", "--format", "json")
    found = json.loads(done.stdout)
    [beta] = found["sites"]
    assert (beta["site"], beta["charge_usu"]) == ("beta", 10**6 * 1000)
    assert beta["duration"]["p10_s"] <= beta["duration"]["p90_s"]
    assert found["duration"]["p50_s"] == pytest.approx(10**6 / found["requests_per_s"])


def test_a_site_that_was_never_timed_is_a_guess_and_told_so(hub: RunningHub, run: Run) -> None:
    hub.catalog.add_site("closed")
    try:
        done = run("estimate", *SIZE)
        assert "closed" in done.stdout
        [line] = [line for line in done.stdout.splitlines() if line.startswith("closed")]
        assert line.split()[1] == "none"
    finally:
        hub.catalog.delete_site("closed")


def test_what_the_project_cannot_pay_is_told(run: Run) -> None:
    done = run("estimate", "--requests", "1e11", *SIZE[2:])
    assert done.exit_code == 0, done.output
    assert "your project cannot pay for all of it there" in done.stderr


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "nan", "1e400", "many", ""])
def test_what_is_no_number_of_requests_is_refused(run: Run, number: str) -> None:
    done = run("estimate", "--requests", number, *SIZE[2:])
    assert done.exit_code == 2, done.output


def test_numbers_and_times_are_read_and_written_as_people_do() -> None:
    assert CountType().convert("1,000,000", None, None) == 10**6
    assert [span(s) for s in (0.04, 36, 750, 11_160, 172_800)] == [
        "0.0 s",
        "36.0 s",
        "12.5 min",
        "3.1 h",
        "2.0 d",
    ]


def test_top_shows_sites_promises_and_spend_once(run: Run) -> None:
    done = run("top", "--once")
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for title in ("Sites", "Waiting at the hub", "Promises in the last hour", "Allocations of"):
        assert title in done.stdout
    assert "standard  first token" in done.stdout
    # A prompt token costs 1 micro-SU, an answer's 2: each of the 24 was charged 2 + 8.
    *spent, _, _, _ = done.stdout.partition("Spent by physics in the last hour\n")[2].splitlines()
    rows = [line.split() for line in spent if line.startswith("fixed@1")]
    assert sum(int(row[2]) for row in rows) == 24
    assert sum(float(row[4]) for row in rows) == pytest.approx(24 * 10 / 1e6)
    assert "Nothing waits." in done.stderr


def test_usage_adds_runs_up_by_model_and_site(run: Run) -> None:
    spent = json.loads(run("usage", "--sums", "--format", "json").stdout)
    assert {one["site"] for one in spent} <= {"alpha", "beta"}
    assert sum(one["num_runs"] for one in spent) == 24
    assert sum(one["output_tokens"] for one in spent) == 24 * 4
    heads, *rows = run("usage", "--sums").stdout.splitlines()
    assert (heads.split()[0], len(rows)) == ("MODEL", len(spent))
    later = run("usage", "--sums", "--since", "2999-01-01")
    assert (later.stdout, later.stderr) == ("", "Nothing was run.\n")
    assert run("usage", "--sums", "--csv").exit_code == 2


def test_top_in_json_is_shown_once(run: Run) -> None:
    found = json.loads(run("top", "--format", "json").stdout)
    assert set(found) == {"sites", "queue", "slo", "spend", "usage"}
    assert {site["name"] for site in found["sites"]} == {"alpha", "beta"}
    assert {one["window"] for one in found["slo"]} == {"5m", "1h", "6h", "24h"}


def test_top_is_drawn_again_and_again_until_it_is_interrupted(environ: dict[str, str]) -> None:
    command = str(Path(sys.executable).parent / "fabric")
    terminal = Terminal(
        {**os.environ, **environ, "TERM": "xterm"}, command, "top", "--interval", "0.2"
    )
    terminal.read_until(r"(?s)Sites.*Spent.*Allocations.*Sites.*Allocations", timeout_s=60)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 0


def test_top_adds_replicas_up_where_a_terminal_has_no_room_for_each(
    environ: dict[str, str],
) -> None:
    command = str(Path(sys.executable).parent / "fabric")
    small = {**os.environ, **environ, "TERM": "xterm", "LINES": "20"}
    terminal = Terminal(small, command, "top", "--interval", "0.2")
    seen = terminal.read_until(r"(?s)Sites.*1 of 1 ready.*Allocations", timeout_s=60)
    assert "inst_" not in seen
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 0


def test_top_says_so_where_no_hub_is(environ: dict[str, str]) -> None:
    away = {**environ, "FABRIC_BASE_URL": "http://127.0.0.1:9"}
    done = CliRunner().invoke(fabric, ["top", "--once"], env=away)
    assert done.exit_code != 0
    assert "cannot be reached" in done.output
