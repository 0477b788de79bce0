"""The screening workflow: a real Parsl app on threads and on workers of their own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.sdk import Choice, Completion, Usage
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import RunningHub, running_hub
from fabric.workflows.screen import DEMO, read_done, read_items, read_yes

SCREEN = [sys.executable, "-m", "fabric.workflows.screen"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path_factory.mktemp("hub"), engine=lambda: FixedDelayEngine(first_token_s=0.05)
    ) as hub:
        yield hub


@pytest.fixture
def environ(hub: RunningHub, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "FABRIC_BASE_URL": hub.base_url,
        "FABRIC_API_KEY": hub.api_key,
        "FABRIC_STATE_DIR": str(tmp_path / "state"),
    }


def run(environ: dict[str, str], cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SCREEN, *args], env=environ, cwd=cwd, capture_output=True, text=True, timeout=150,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["threads", "htex"])
def test_every_text_is_answered_charged_and_placed(
    hub: RunningHub, environ: dict[str, str], tmp_path: Path, executor: str
) -> None:
    done = run(environ, tmp_path, "--demo", "--workers", "2", "--parsl-executor", executor)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["text"] for result in results} == set(DEMO)
    assert {result["site"] for result in results} <= set(hub.sites)
    recorded = {run.id: run.charge_usu for run in hub.catalog.runs("physics", limit=100)}
    assert all(recorded[result["run"]] == result["charge_usu"] > 0 for result in results)
    assert f"6/{len(DEMO)} " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_output_is_not_asked_again(environ: dict[str, str], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("first\n\nsecond\nfirst\n")
    args = ["--prompts", str(prompts), "--output", str(output)]
    assert len(run(environ, tmp_path, *args).stdout.splitlines()) == 2
    with output.open("a") as file:
        file.write('{"id": "torn')
    prompts.write_text("first\nsecond\nthird\n")
    again = run(environ, tmp_path, *args)
    assert [json.loads(line)["text"] for line in again.stdout.splitlines()] == ["third"]
    assert "3 texts, 2 of them done before" in again.stderr
    assert len(read_done(output)) == 3


def test_a_text_that_is_too_long_fails_alone_and_is_tried_again(
    environ: dict[str, str], tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"id": i, "text": "long " * n}) for i, n in ((1, 3000), (2, 3)))
    )
    args = ["--prompts", str(prompts), "--output", str(output)]
    done = run(environ, tmp_path, *args)
    assert done.returncode == 1
    results = {item["id"]: item for item in map(json.loads, done.stdout.splitlines())}
    assert results["1"]["error"]["code"] == "context_length_exceeded"
    assert results["2"]["answer"] == "word0"
    assert read_done(output) == {"2"}


@pytest.mark.parametrize(
    ("args", "change", "code", "sentence"),
    [
        (["--demo", "--model", "nope"], {}, 1, "The model 'nope' is not in the catalog"),
        (["--demo"], {"FABRIC_API_KEY": "wrong"}, 1, "The API key is not valid"),
        (["--demo"], {"FABRIC_BASE_URL": "http://127.0.0.1:1"}, 1, "cannot be reached"),
        (["--prompts", "/none"], {}, 2, "No such file"),
        (["--demo", "--workers", "0"], {}, 2, "at least 1"),
        ([], {}, 2, "required"),
    ],
)
def test_what_stops_every_text_is_said_once(
    environ: dict[str, str],
    tmp_path: Path,
    args: list[str],
    change: dict[str, str],
    code: int,
    sentence: str,
) -> None:
    done = run(environ | change, tmp_path, *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count(sentence) == 1
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_was_done(environ: dict[str, str], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(f"text {index}" for index in range(2000)))
    args = ["--prompts", str(prompts), "--output", str(output), "--workers", "2"]
    with subprocess.Popen(
        [*SCREEN, *args], env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed, remarks = [first, *process.stdout.readlines()], process.stderr.read().decode()
    assert process.returncode == 130
    assert "Interrupted; what was printed is complete. Run it again to go on." in remarks
    assert "Traceback" not in remarks
    done, shown = read_done(output), {json.loads(line)["id"] for line in printed}
    assert shown <= done
    assert len(done) <= len(shown) + 1  # the file is written first


def answer(*alternatives: tuple[str, float]) -> Completion:
    top = [{"token": token, "logprob": math.log(p)} for token, p in alternatives]
    logprobs = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]}
    return Completion(
        text="x",
        choices=(Choice(text="x", finish_reason="length", logprobs=logprobs),),
        model="m",
        site="alpha",
        instance="i",
        digest="d",
        attempts=1,
        reason="",
        usage=Usage(),
        charge_usu=0,
        first_token_s=None,
        total_s=0.0,
        run_id="run_1",
    )


def test_yes_is_weighed_against_no_in_all_spellings() -> None:
    weighed = read_yes(answer(("Yes", 0.3), (" yes", 0.3), ("No", 0.2), ("Maybe", 0.2)))
    assert weighed == pytest.approx(0.6 / 0.8)
    assert read_yes(answer(("Maybe", 1.0))) is None


def test_lines_of_json_need_a_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 7, "text": "a"}\nplain\n{"id": 8}\n')
    items = read_items(file)
    assert (next(items).id, next(items).text) == ("7", "plain")
    with pytest.raises(ValueError, match="line 3"):
        next(items)
