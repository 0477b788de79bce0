"""Weights on their way to the nodes of a job; another node is this one, behind a shell."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from fabric.config import System
from fabric.errors import NodeFailed
from fabric.launch.jobs import Order
from fabric.launch.jobs.giving import WeightsServer
from fabric.launch.jobs.nodes import NodeProcess
from fabric.launch.jobs.replicas import Replica, Replicas
from fabric.launch.jobs.stage import Stage
from fabric.launch.jobs.weights import read_manifest
from fabric.messages import EngineOptions, Launch
from fabric.messages.weights import WeightsSource, make_ticket
from fabric.payloads.manifest import MANIFEST_FILE

RATES = {"shared_read_gb_s": 1.0, "local_read_gb_s": 4.0, "local_write_gb_s": 2.0}


class Nodes:
    """Stages of jobs, and what they said; ``fails`` has the other node's shell fail."""

    def __init__(self, folder: Path, log: IO[bytes]) -> None:
        self.folder, self.log = folder, log
        self.said: list[str] = []
        self.told: list[str] = []
        self.started: list[NodeProcess] = []
        self.fails = False
        shell = folder / "bin" / "ssh"
        shell.parent.mkdir()
        shell.write_text('#!/bin/sh\nshift 3\n[ -e "$0.fails" ] && exit 9\nexec sh -c "$1"\n')
        shell.chmod(0o755)
        self.environ = {**os.environ, "PATH": f"{shell.parent}:{os.environ['PATH']}"}

    def stage(self, num_nodes: int = 1, *, staging: str = "always", **storage: object) -> Stage:
        asked = {"model": "m@1", "machine": "here", "walltime": "00:30:00", "staging": staging}
        if self.fails:
            (self.folder / "bin" / "ssh.fails").touch()
        facts: dict[str, Any] = {
            "center": "Here",
            "scheduler": "pbspro",
            "sources": ["a test"],
            "checked": "2026-11",
            "storage": RATES | {"local_dir": str(self.folder)} | storage,
        }
        return Stage(
            order=Order.model_validate(asked),
            options=EngineOptions(pipeline_parallel=num_nodes),
            system=System.model_validate(facts),
            host="n1",
            ranks=(1,) * num_nodes,
            manifests=self.folder / "manifests",
            run_on=self.run_on,
            say=self.said.append,
            tell=self.told.append,
        )

    def run_on(self, index: int, command: Sequence[str]) -> NodeProcess:
        host = f"n{index + 1}"
        process = NodeProcess("ssh", host, index, command, log=self.log, environ=self.environ)
        self.started.append(process)
        return process


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with (tmp_path / "log").open("wb") as log:
        nodes = Nodes(tmp_path, log)
        yield nodes
        for one in nodes.started:
            one.end()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    weights = tmp_path / "shared" / "m"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(os.urandom(10_000_000))
    return Launch(instance="i", site="s", model="m@1", source=str(weights), digest=None, token="t")


def test_a_copy_is_made_on_all_nodes_and_found_by_the_next_job(
    nodes: Nodes, launch: Launch
) -> None:
    copy = Path(nodes.stage(2).bring(launch))
    assert copy != Path(launch.source)
    weights = (copy / "model.safetensors").read_bytes()
    assert weights == (Path(launch.source) / "model.safetensors").read_bytes()
    assert [one.poll() for one in nodes.started] == [0]
    assert any(line.startswith("checking weights: ") for line in nodes.told)
    assert any(line.startswith("copying weights: ") for line in nodes.told)
    assert nodes.told[0].endswith(" of 0.01 GB")

    nodes.said.clear()
    assert nodes.stage(2, staging="auto").bring(launch) == str(copy)
    assert "an earlier job has left them" in nodes.said[0]


def test_a_node_that_cannot_copy_is_named(nodes: Nodes, launch: Launch) -> None:
    nodes.fails = True
    with pytest.raises(NodeFailed, match=r"node n2 .* copying the weights there ended with code 9"):
        nodes.stage(2).bring(launch)


def test_all_nodes_read_from_a_replica_what_nothing_else_has(nodes: Nodes, launch: Launch) -> None:
    folder = Path(nodes.stage().bring(launch))
    manifest = read_manifest(folder / MANIFEST_FILE)
    server = WeightsServer(folder, manifest, "127.0.0.1")
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        ticket = make_ticket(server.offer.key, "i2", time.time() + 600)
        source = WeightsSource(instance="i1", url=server.offer.url, ticket=ticket)
        told, gb_s = Replica(source).measure()
        replicas = Replicas([Replica(source)], nodes.said.append, manifest=told, gb_s=gb_s)
        (other_disk := nodes.folder / "other").mkdir()
        stage = nodes.stage(2, staging="auto", local_dir=str(other_disk))
        stage = dataclasses.replace(stage, find_replicas=lambda: replicas)
        shutil.rmtree(launch.source)
        copy = Path(stage.bring(launch))
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
    assert (told, gb_s > 0) == (manifest, True)
    assert copy.is_relative_to(other_disk)
    assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [one.poll() for one in nodes.started] == [0]
    assert nodes.said[-2].endswith("from a replica: they are nowhere else")


def test_one_file_is_copied_under_its_name(nodes: Nodes, launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "shared" / "m.gguf"
    file.write_bytes(b"GGUF and more")
    source = nodes.stage().bring(launch.model_copy(update={"source": f"gguf:{file}"}))
    assert source != str(file)
    assert source.endswith("/m.gguf")
    assert Path(source).read_bytes() == b"GGUF and more"


@pytest.mark.parametrize(
    ("staging", "storage", "said"),
    [
        ("never", {}, "as asked"),
        ("auto", {}, "1 x 0.01 GB take 0 s from the shared"),
        ("always", {"local_dir": None}, "no disk of the nodes is known"),
        ("always", {"local_dir": "/no/such/disk"}, "it cannot be used"),
    ],
)
def test_weights_are_read_where_they_are_unless_a_copy_pays(
    nodes: Nodes, launch: Launch, staging: str, storage: dict[str, object], said: str
) -> None:
    assert nodes.stage(staging=staging, **storage).bring(launch) == launch.source
    assert said in nodes.said[0]


def test_a_job_that_is_told_to_end_stops_copying(nodes: Nodes, launch: Launch) -> None:
    class EndedError(Exception):
        pass

    def tell(_: str) -> None:
        raise EndedError

    with pytest.raises(EndedError):
        dataclasses.replace(nodes.stage(), tell=tell).bring(launch)
    # What was read by then is not taken for a copy.
    assert not [path for path in nodes.folder.glob("fabric-*/versions/[!.]*") if path.is_dir()]
    assert Path(nodes.stage().bring(launch)).is_dir()
