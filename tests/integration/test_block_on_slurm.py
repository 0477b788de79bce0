"""What runs inside a job, on a real Slurm: one model over two nodes, its weights on their disks."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from fabric.testing.hub import RunningHub, running_hub, wait_until
from fabric.testing.slurm import Slurm
from fabric.testing.slurm.user import User, states
from fabric.testing.tiny_model import save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "tiny@1"
REAL = "fabric.instance"
TWO_NODES = ("--nodes", "2", "--dtype", "float32", "--max-rows", "4", "--wait")
PROMPT = "a star"
AGENT = "fabric.engine.partition.agent"
CONTEXT_TOKENS = 4096


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "tiny"
    return save_tiny_llama(path, max_position_embeddings=CONTEXT_TOKENS, eos_token_id=None)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.catalog.add_model("tiny", "1", source=str(tiny_dir), context_tokens=CONTEXT_TOKENS)
        hub.catalog.add_model("quick", "1", source="fixed-delay:", context_tokens=2048)
        yield hub


@pytest.fixture
def local_dir(tmp_path: Path) -> Path:
    path = tmp_path / "nvme"
    path.mkdir()
    return path


@pytest.fixture
def user(hub: RunningHub, slurm: Slurm, tmp_path: Path, local_dir: Path) -> Iterator[User]:
    rates = {"shared_read_gb_s": 1.0, "local_read_gb_s": 4.0, "local_write_gb_s": 2.0}
    user = User(hub, slurm, tmp_path, system={"storage": rates | {"local_dir": str(local_dir)}})
    try:
        yield user
    finally:
        user.end_all()


def on_node(slurm: Slurm, name: str, what: str) -> list[psutil.Process]:
    """Return the processes of jobs on a node whose command names something."""
    return [one for one in slurm.processes_on(name) if what in " ".join(one.cmdline())]


def expected_answer(path: Path, num_tokens: int) -> str:
    """Return what transformers answers, in one process."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def are_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_two_nodes_answer_as_one_process_does_and_drain_together(
    user: User, slurm: Slurm, tiny_dir: Path, local_dir: Path
) -> None:
    args = (*TWO_NODES, "--copy-weights", "always")
    launch = user.launch(*args, walltime="00:20:00", model=MODEL, module=REAL)
    ranks = on_node(slurm, "n2", "fabric.engine.partition.follower")
    assert len(ranks) == 1
    assert not on_node(slurm, "n1", "fabric.engine.partition.follower")
    answer = user.fabric.complete(PROMPT, model=MODEL, max_tokens=40, temperature=0)
    assert answer.text == expected_answer(tiny_dir, 40)
    (copy,) = (path for path in local_dir.glob("fabric-*/versions/*") if path.is_dir())
    assert f"weights: in {copy}" in user.log_of(launch["jobs"][0])

    stream = user.fabric.stream(PROMPT, model=MODEL, max_tokens=150, temperature=0)
    text = next(stream).text
    slurm.run("scancel", "--batch", "--signal=USR1", launch["jobs"][0]["job_id"])
    rest = list(stream)
    text += "".join(chunk.text for chunk in rest)
    assert (text, rest[-1].finish_reason) == (expected_answer(tiny_dir, 150), "length")
    after = user.wait(launch["name"], lambda shown: shown["ended_at"] is not None)
    assert states(after) == ["stopped"], after
    assert after["jobs"][0]["detail"] in ("it was asked to leave", "it left")
    assert are_gone(ranks)


SERVER = """
import os, pathlib, socket, sys, time
wanted = pathlib.Path({wanted!r})
port = [word.partition("=")[2] for word in sys.argv if word.startswith("--port=")]
if port and not wanted.exists():
    wanted.with_suffix(".new").write_text(*port)
    wanted.with_suffix(".new").rename(wanted)
    while not wanted.with_suffix(".taken").exists():
        time.sleep(0.05)
    socket.create_server(("127.0.0.1", int(*port)))
command = [sys.executable, "-m", "fabric.testing.vllm_server", *sys.argv[1:]]
os.execv(sys.executable, command)
"""
"""A server whose port somebody else has got when it first starts; it binds it before it loads."""


@contextmanager
def taking_a_port(wanted: Path) -> Iterator[None]:
    """Listen at the port that a server says it was told, until the end."""

    def take() -> None:
        while not wanted.exists():
            if over.wait(0.05):
                return
        with socket.create_server(("127.0.0.1", int(wanted.read_text()))):
            wanted.with_suffix(".taken").touch()
            over.wait()

    over, thief = threading.Event(), threading.Thread(target=take)
    thief.start()
    try:
        yield
    finally:
        over.set()
        thief.join()


def test_a_vllm_server_over_two_nodes_is_started_on_both_past_a_port_that_is_taken(
    hub: RunningHub, slurm: Slurm, tiny_dir: Path, tmp_path: Path
) -> None:
    """Its protocol and command line are vLLM's; what computes is our own."""
    wanted = tmp_path / "port"
    command = [sys.executable, "-c", SERVER.format(wanted=str(wanted))]
    server = {"command": command, "start_s": 200}
    options = {"backend": "vllm", "vllm": server, "cache_bytes": 2**24}
    site = {"name": "tiny", "source": str(tiny_dir), "context_tokens": CONTEXT_TOKENS}
    user = User(hub, slurm, tmp_path, models=[site | {"options": options}])
    try:
        with taking_a_port(wanted):
            launch = user.launch(*TWO_NODES, model=MODEL, module=REAL)
        assert f"port {wanted.read_text()} was taken meanwhile, another is tried" in user.log_of(
            launch["jobs"][0]
        )
        ranks = on_node(slurm, "n2", "fabric.engine.partition")
        assert len(ranks) > 1
        answer = user.fabric.complete(PROMPT, model=MODEL, max_tokens=20, temperature=0)
        assert answer.text == expected_answer(tiny_dir, 20)
        user.run("stop", launch["name"])
        assert are_gone(ranks)
    finally:
        user.end_all()


def launch_whatever_computes(user: User) -> dict[str, Any]:
    """Launch on two nodes an engine that needs no ranks: what is on the other one is watched."""
    launch = user.launch("--nodes", "2", "--wait", model="quick@1")
    wait_until(lambda: bool(on_node(user.slurm, "n2", AGENT)), timeout_s=120)
    return launch


def test_an_agent_that_is_killed_ends_the_instance_with_the_reason(
    user: User, slurm: Slurm
) -> None:
    launch = launch_whatever_computes(user)
    for agent in on_node(slurm, "n2", AGENT):
        agent.kill()
    after = user.wait(launch["name"], lambda shown: shown["ended_at"] is not None)
    assert states(after) == ["failed"]
    detail = after["jobs"][0]["detail"]
    assert "The node n2 is lost to its job: the processes there ended with code" in detail


def test_a_node_that_dies_ends_the_job_with_the_reason(user: User, slurm: Slurm) -> None:
    launch = launch_whatever_computes(user)
    try:
        slurm.kill_node("n2")
        after = user.wait(launch["name"], lambda shown: shown["ended_at"] is not None)
    finally:
        slurm.start_node("n2")
    assert states(after) == ["failed"]
    assert "lost" in after["jobs"][0]["detail"], after
