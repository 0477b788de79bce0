"""The command line as its users meet it: processes, a terminal, a real hub."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.testing.commands import get_environ
from fabric.testing.engine import FixedDelayEngine, word
from fabric.testing.hub import RunningHub, running_hub, wait_until
from fabric.testing.scripted_hub import chat_events, scripted_hub
from fabric.testing.terminal import Terminal

FABRIC = [sys.executable, "-m", "fabric.cli"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path_factory.mktemp("hub"), engine=lambda: FixedDelayEngine(token_s=0.02)
    ) as hub:
        yield hub


@pytest.fixture
def environ(hub: RunningHub, tmp_path: Path) -> dict[str, str]:
    return get_environ(tmp_path, hub, TERM="xterm", COLUMNS="120")


def run(
    environ: dict[str, str], *args: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*FABRIC, *args], env=environ, input=stdin, capture_output=True, timeout=60, check=False
    )
    return subprocess.CompletedProcess(
        args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_a_question_is_answered_on_stdout_and_explained_on_stderr(
    environ: dict[str, str],
) -> None:
    done = run(environ, "query", "What is a quasar?", "--max-tokens", "4", "--site", "beta")
    assert done.returncode == 0
    assert done.stdout == "word0 word1 word2 word3\n"
    assert "beta: " in done.stderr
    assert re.search(r"first token \d\.\d\d s · [\d.]+ tokens/s · 0\.0000\d\d SU", done.stderr)


def test_a_prompt_comes_from_a_pipe(environ: dict[str, str]) -> None:
    for args in (("query", "-"), ("query",)):
        done = run(environ, *args, "--raw", "--max-tokens", "2", stdin="grüße und so".encode())
        assert (done.returncode, done.stdout) == (0, "word0 word1\n")


def test_json_is_the_only_thing_on_stdout(environ: dict[str, str]) -> None:
    done = run(environ, "query", "hi", "--max-tokens", "2", "--format", "json")
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["text"] == "word0 word1"
    assert reply["fabric"]["charge_usu"] == 2 * 1 + 2 * 2
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        *(["status"], ["models"], ["sites"], ["usage"], ["runs"], ["explain", "hi"]),
        *(["config", "show"], ["config", "path"]),
    ],
)
def test_every_listing_is_readable_and_is_json_on_demand(
    environ: dict[str, str], command: list[str]
) -> None:
    text = run(environ, *command)
    assert (text.returncode, text.stderr) == (0, "")
    assert text.stdout.strip()
    assert "\x1b" not in text.stdout
    data = run(environ, *command, "--format", "json")
    assert data.returncode == 0
    json.loads(data.stdout)


def test_explain_marks_the_choice_and_names_what_excludes(environ: dict[str, str]) -> None:
    done = run(environ, "explain", "hi", "--site", "beta")
    lines = done.stdout.splitlines()
    assert next(line for line in lines if line.startswith("▸")).split()[1] == "beta"
    assert "may run only at beta" in next(line for line in lines if line.startswith("   alpha"))


def test_usage_adds_up(environ: dict[str, str]) -> None:
    run(environ, "query", "hi", "--max-tokens", "2")
    statement = json.loads(run(environ, "usage", "--limit", "1", "--format", "json").stdout)
    assert statement["lines"][0]["amount_usu"] == -6
    assert statement["lines"][0]["balance_usu"] == statement["allocations"][0]["available_usu"]
    assert "-0.000006" in run(environ, "usage", "--limit", "1").stdout


def test_settings_are_shown_with_their_source_and_without_secrets(
    hub: RunningHub, environ: dict[str, str]
) -> None:
    done = run(environ, "config", "show")
    assert re.search(r"client\.base_url +http://127\.0\.0\.1:\d+ +FABRIC_BASE_URL", done.stdout)
    assert hub.api_key not in done.stdout
    path = run(environ, "config", "path").stdout.strip()
    assert path == f"{environ['XDG_CONFIG_HOME']}/fabric/config.yaml"


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["query", "x", "--model", "nope"], 3, "The model 'nope' is not in the catalog"),
        (["query", "x", "--site", "nowhere"], 3, "The site 'nowhere' is not in the catalog"),
        (["query", "x", "--max-tokens", "5000"], 3, "the model's context is 2048 tokens"),
        (["runs", "run_none"], 3, "There is no run 'run_none'"),
        (["query", "x", "--api-key", "wrong"], 4, "The API key is not valid"),
        (["query", "x", "--base-url", "http://127.0.0.1:1"], 5, "start a local federation with"),
        (["models", "--base-url", "nonsense"], 3, "The setting 'client.base_url'"),
    ],
)
def test_errors_are_one_sentence_with_a_documented_code(
    environ: dict[str, str], args: list[str], code: int, sentence: str
) -> None:
    done = run(environ, *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("Error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    as_json = run(environ, *args, "--format", "json")
    assert as_json.returncode == code
    assert sentence in json.loads(as_json.stderr)["error"]["message"]


@pytest.mark.parametrize(
    ("args", "stdin", "sentence"),
    [
        (["query", ""], b"", "The prompt is empty"),
        (["query", "-"], b"\xff\xfe", "not text in UTF-8"),
        (["query", "x", "--temperature", "9"], b"", "not in the range"),
        (["query", "x", "--max-tokens", "0"], b"", "not in the range"),
        (["quary"], b"", "No such command"),
        (["chat", "--format", "json"], b"", "needs a message"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    environ: dict[str, str], args: list[str], stdin: bytes, sentence: str
) -> None:
    done = run(environ, *args, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_a_chat_message_is_answered_once(environ: dict[str, str]) -> None:
    done = run(environ, "chat", "-m", "hello", "--max-tokens", "3")
    assert (done.returncode, done.stdout) == (0, "word0 word1 word2\n")


def test_a_chat_in_a_pipe_remembers_its_turns(environ: dict[str, str]) -> None:
    done = run(environ, "chat", "--max-tokens", "1", stdin=b"one\ntwo\n/clear\nthree\n/quit\n")
    assert (done.returncode, done.stdout) == (0, "word0\n" * 3)
    runs = json.loads(run(environ, "runs", "--limit", "3", "--format", "json").stdout)
    assert [run["usage"]["prompt_tokens"] for run in reversed(runs)] == [2, 2 + 2 + 2, 2]


def test_a_broken_stream_ends_with_5_after_what_had_come(environ: dict[str, str]) -> None:
    with scripted_hub() as scripted:
        scripted.play(chat_events("Ju", "pi", done=False))
        address = ["--base-url", scripted.url, "--model", "toy"]
        terminal = Terminal(environ, *FABRIC, "query", "Which?", *address)
        code = terminal.finish()
    assert code == 5
    assert re.search(r"Jupi\r\n.*Error: .*broke after 2 chunk", terminal.seen, re.S)


def test_on_a_terminal_tokens_appear_as_they_come(environ: dict[str, str]) -> None:
    terminal = Terminal(environ, *FABRIC, "query", "tell me", "--max-tokens", "25")
    terminal.read_until("word24")
    spread_s = terminal.arrivals[-1] - terminal.arrivals[0]
    assert terminal.finish() == 0
    assert spread_s > 0.02 * 24 / 2
    assert len(terminal.arrivals) > 10


def test_ctrl_c_ends_an_answer_with_130_and_frees_its_row(
    hub: RunningHub, environ: dict[str, str]
) -> None:
    terminal = Terminal(environ, *FABRIC, "query", "tell me", "--max-tokens", "2000")
    terminal.read_until("word3")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.finish() == 130
    assert "Interrupted." in terminal.seen
    assert "Traceback" not in terminal.seen
    wait_until(lambda: all(site.engine.load().num_running == 0 for site in hub.sites.values()))


def test_ctrl_c_in_a_chat_ends_the_answer_and_not_the_chat(environ: dict[str, str]) -> None:
    terminal = Terminal(environ, *FABRIC, "chat", "--max-tokens", "2000")
    terminal.read_until("> ")
    terminal.type("hello\n")
    terminal.read_until("word3")
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.read_until(r"\[stopped\]")
    terminal.type("/quit\n")
    assert terminal.finish() == 0


def test_a_reader_that_leaves_early_is_no_traceback(environ: dict[str, str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [*FABRIC, "config", "show"], env=environ, stdout=closed, stderr=subprocess.PIPE,
            timeout=60, check=False,
        )  # fmt: skip
    assert b"Traceback" not in done.stderr


def test_answers_of_several_commands_at_once_do_not_mix(environ: dict[str, str]) -> None:
    outputs: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: outputs.append(run(environ, "query", "hi", "--max-tokens", "3").stdout)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == ["".join(word(position) for position in range(3)) + "\n"] * 4
