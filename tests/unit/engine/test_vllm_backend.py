"""How the backend reads what a server sends, and what it does when one fails."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.vllm.embeddings import find_pooling
from fabric.engine.vllm.engine import VllmEngine
from fabric.engine.vllm.facts import read_facts
from fabric.engine.vllm.load import Busy, Gauges
from fabric.engine.vllm.protocol import get_refusal, read_event, read_prompt_scores, read_steps
from fabric.errors import BackendFailed, ModelNotLoadable, RequestInvalid
from fabric.messages import EngineOptions, VllmOptions, pack_floats
from fabric.testing.processes import wait_ended
from fabric.testing.tiny_model import save_tiny_llama

CONFIG = EngineConfig(
    dtype="float32", num_threads=1, cache_bytes=4 * 2**20, max_rows=4, step_tokens=32
)


def get_engine(path: Path | str, **options: Any) -> VllmEngine:
    return VllmEngine(ModelSource.parse(str(path)), CONFIG, VllmOptions(**options), name="tiny")


def test_a_chunk_of_several_tokens_is_read_whole() -> None:
    """As vLLM 0.32 sent it."""
    chunk = {
        "choices": [
            {
                "index": 0,
                "text": " a b",
                "token_ids": [7, 8],
                "logprobs": {
                    "text_offset": [0, 10],
                    "tokens": ["token_id:7", "token_id:8"],
                    "token_logprobs": [-0.5, -2.0],
                    "top_logprobs": [
                        {"token_id:7": -0.5, "token_id:9": -1.5},
                        {"token_id:8": -2.0, "token_id:9": -0.25},
                    ],
                },
                "finish_reason": "length",
            }
        ]
    }
    [step] = read_steps(chunk, 1)
    assert (step.choice, step.ids, step.finish_reason) == (0, [7, 8], "length")
    assert [(score.logprob, score.top) for score in step.scores if score] == [
        (-0.5, ((7, -0.5),)),
        (-2.0, ((9, -0.25),)),
    ]


@pytest.mark.parametrize(
    "chunk",
    [
        {},
        {"choices": [{"token_ids": [1]}]},
        {"choices": 5},
        {"choices": [{"index": 0, "token_ids": [1]}]},
        {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"top_logprobs": [{"x": 1}]}}]},
    ],
)
def test_chunks_without_their_ids_or_scores_are_the_servers_failure(chunk: Any) -> None:
    with pytest.raises(BackendFailed):
        list(read_steps(chunk, 1))
    with pytest.raises(BackendFailed):
        read_prompt_scores(chunk, [1, 2], 0)


@pytest.mark.parametrize("line", ["data: {", "data: 5", 'data: {"error": {"message": "no"}}'])
def test_a_stream_that_breaks_is_the_servers_failure(line: str) -> None:
    with pytest.raises(BackendFailed):
        read_event(line)


@pytest.mark.parametrize("line", ["", ": ping", "data: [DONE]", "event: x"])
def test_lines_that_say_nothing_are_passed_over(line: str) -> None:
    assert read_event(line) is None


def test_refusals_are_the_callers_or_the_servers() -> None:
    told = get_refusal(400, json.dumps({"error": {"message": "bad grammar"}}))
    assert isinstance(told, RequestInvalid)
    assert "bad grammar" in told.message
    assert isinstance(get_refusal(500, "<html>"), BackendFailed)
    assert isinstance(get_refusal(401, '{"error": "Unauthorized"}'), BackendFailed)
    assert isinstance(get_refusal(404, "[]"), BackendFailed)


def test_moments_are_shared_among_the_tasks_that_are_there() -> None:
    busy, pause = Busy(), threading.Event()
    busy.begin("a", 1, 4)
    pause.wait(0.02)
    busy.begin("b", 2, 4)
    assert busy.load(Gauges(), max_rows=2).num_running == 2
    assert busy.load(Gauges(), max_rows=2).num_waiting == 1
    pause.wait(0.02)
    shares = [busy.end("a", 5), busy.end("b", 5)]
    load = busy.load(Gauges(), max_rows=2)
    assert sum(shares) == pytest.approx(load.busy_s)
    assert shares[0] > shares[1] > 0.0
    assert load.decode_tokens_per_s > 0.0


THIEF = """
import pathlib, subprocess, sys
port = next(word.partition("=")[2] for word in sys.argv if word.startswith("--port="))
seen = pathlib.Path({folder!r}, "ports")
with seen.open("a") as file:
    print(port, file=file)
if len(seen.read_text().split()) > 1:
    sys.exit(3)
holder = subprocess.Popen(
    [sys.executable, "-c", {holder!r}, port],
    stdin=open({fifo!r}), stdout=subprocess.PIPE, start_new_session=True,
)
holder.stdout.readline()
sys.exit(1)
"""
HOLDER = """
import socket, sys
held = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(flush=True)
sys.stdin.read()
"""


def test_a_port_that_somebody_takes_first_is_chosen_anew(tiny: Path, tmp_path: Path) -> None:
    """Another process binds it after it was chosen; the second server ends for another reason."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)  # the holder of the port reads until this is closed
    try:
        code = THIEF.format(folder=str(tmp_path), fifo=str(fifo), holder=HOLDER)
        engine = get_engine(tiny, command=(sys.executable, "-c", code))
        with pytest.raises(ModelNotLoadable, match="ended with code 3"):
            engine.start()
        first, second = (tmp_path / "ports").read_text().split()
        assert first != second
    finally:
        os.close(held)


def test_a_meeting_point_that_somebody_takes_first_is_told(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        meeting = "127.0.0.1:{1}".format(*thief.getsockname())
        config = dataclasses.replace(
            CONFIG, tensor_parallel=2, local_ranks=1, rendezvous=meeting, context_tokens=64
        )
        options = VllmOptions(command=(sys.executable, "-c", "raise SystemExit(1)"))
        engine = VllmEngine(ModelSource.parse(str(tiny)), config, options, name="tiny")
        with pytest.raises(ModelNotLoadable, match=f"{meeting}, where its nodes should meet, was"):
            engine.start()


def test_options_reach_an_instance_as_text() -> None:
    options = EngineOptions(backend="vllm", vllm=VllmOptions(command=("vllm", "serve"), start_s=9))
    assert EngineOptions.model_validate_json(options.model_dump_json()) == options
    with pytest.raises(ValueError, match="url"):
        VllmOptions(url="ftp://x")


# ---- servers that fail ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"command": ("/no/such/program",)}, "ended with code 127"),
        ({"command": (sys.executable, "-c", "raise SystemExit(3)")}, "ended with code 3"),
        (
            {"command": (sys.executable, "-c", "import time; time.sleep(60)"), "start_s": 1.0},
            "not healthy after 1 s",
        ),
        ({"url": "http://127.0.0.1:1", "start_s": 0.5}, "not healthy after 0.5 s"),
        ({"url": "http://127.0.0.1:1", "key_path": "/no/such/key"}, "key cannot be read"),
    ],
)
def test_a_server_that_does_not_come_up_says_why(
    tiny: Path, options: dict[str, Any], reason: str
) -> None:
    engine = get_engine(tiny, **options)
    with pytest.raises(ModelNotLoadable, match=reason):
        engine.start()
    assert not [one for one in psutil.Process().children() if "vllm.guard" in str(one.cmdline())]
    engine.close()


def test_a_gguf_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotLoadable, match="transformers directories"):
        get_engine(tmp_path / "m.gguf").start()


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Serve one fixed model list, health and other answers on a socket, until the test ends."""
    servers: list[socket.socket] = []

    def start(root: str, **others: object) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        model = {"id": "tiny", "root": root, "max_model_len": 64}
        bodies = {"/v1/models": {"data": [model]}, "/version": {"version": "0"}, "/health": {}}
        bodies |= {f"/v1/{name}": answer for name, answer in others.items()}

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    path = connection.recv(65536).split()[1].decode()
                    answer = bodies.get(path, {})
                    status = "404 Not Found" if answer is None else "200 OK"
                    body = json.dumps(answer).encode()
                    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {len(body)}"
                    connection.sendall(head.encode() + b"\r\n\r\n" + body)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_a_server_of_another_model_is_refused(
    tiny: Path, answering: Callable[..., str], heard: Callable[..., Any]
) -> None:
    with pytest.raises(ModelNotLoadable, match="serves /elsewhere and not"):
        get_engine(tiny, url=answering("/elsewhere")).start()


@pytest.mark.parametrize(
    ("runner", "route"), [("generate", "completions"), ("pooling", "embeddings")]
)
def test_a_server_that_does_something_else_is_refused_with_a_remedy(
    tiny: Path, answering: Callable[..., str], runner: str, route: str
) -> None:
    url = answering(str(tiny), **{route: None})
    with pytest.raises(ModelNotLoadable, match=f"start it with --runner {runner}"):
        get_engine(tiny, url=url, runner=runner).start()


def vector_reply(vector: Sequence[float], num_tokens: int = 8) -> dict[str, Any]:
    data = [{"index": 0, "embedding": pack_floats(list(vector))}]
    return {"data": data, "usage": {"prompt_tokens": num_tokens}}


def test_a_server_whose_vectors_are_others_is_refused(
    tiny: Path, answering: Callable[..., str]
) -> None:
    """It is asked for a few tokens, whose vector the files give too."""
    reads = ModelSource.parse(str(tiny))
    facts = read_facts(reads, CONFIG, name="tiny", expected_digest=None, embeds=True)
    assert facts.pooled is not None
    mean, last = (facts.pooled[kind].tolist() for kind in ("mean", "last"))
    refused = {
        r"pooled otherwise \(last\); .* pools by mean": vector_reply(last),
        "not those of its hidden states": vector_reply([1.0] * 64),
        "embeds no prompt .* 3 numbers from 8 tokens, where 64 from 8": vector_reply([1.0] * 3),
        "embeds no prompt .* from 7 tokens": vector_reply(mean, 7),
        "embeds no prompt .* cannot be read": {"data": []},
    }
    for reason, reply in refused.items():
        engine = get_engine(tiny, url=answering(str(tiny), embeddings=reply), runner="pooling")
        with pytest.raises(ModelNotLoadable, match=reason):
            engine.start()
    engine = get_engine(
        tiny, url=answering(str(tiny), embeddings=vector_reply(mean)), runner="pooling"
    )
    engine.start()
    assert engine.info.limits.modes == ("embed",)
    engine.close()


def test_a_vector_that_is_not_a_number_is_of_no_pooling() -> None:
    pooled = {"mean": torch.ones(4), "last": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    assert find_pooling(torch.full((4,), 2.0), pooled, dtype="float32") == "mean"
    assert find_pooling(torch.full((4,), torch.nan), pooled, dtype="float32") is None
    assert find_pooling(torch.zeros(4), pooled, dtype="bfloat16") is None


def test_a_server_that_runs_already_is_used(
    tiny: Path,
    answering: Callable[..., str],
    driver_of: Callable[..., Any],
) -> None:
    engine = get_engine(tiny, url=answering(str(tiny)))
    engine.start()
    try:
        assert engine.info.limits.context_tokens == 64
        # It answers everything with an empty object: the task fails, the engine goes on.
        asked = driver_of(engine).greedy("hi")
        assert asked.failed.failure.code == "backend_failed"
    finally:
        engine.close()
    assert driver_of(engine).greedy("hi").failed.failure.code == "engine_stopped"


@pytest.mark.timeout(240)
def test_a_server_that_is_killed_ends_the_tasks_and_the_engine(
    tiny: Path, driver_of: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    engine = get_engine(tiny, command=(sys.executable, "-m", "fabric.testing.vllm_server"))
    engine.start()
    try:
        driver = driver_of(engine)
        [guard] = [p for p in psutil.Process().children() if "vllm.guard" in " ".join(p.cmdline())]
        [server] = guard.children()
        assert not any("VLLM_API_KEY" in part for part in server.cmdline())
        running = driver.greedy("hi", max_tokens=200)
        wait_until(lambda: bool(running.tokens()), 60)
        os.kill(server.pid, signal.SIGKILL)
        assert running.failed.failure.code in ("backend_failed", "engine_stopped")
        wait_until(lambda: driver.greedy("hi").failed.failure.code == "engine_stopped", 30)
    finally:
        engine.close()
    assert wait_ended([guard, server], timeout_s=20) == []
