"""What can go wrong inside a job, on a real Slurm: each ends with its reason, and not for ever."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fabric.testing.hub import RunningHub, running_hub
from fabric.testing.slurm import Slurm
from fabric.testing.slurm.user import MACHINE, User, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WALLTIME = ("--walltime", "00:05:00")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        for name, source in (
            *(("brought", "fixed-delay:"), ("mute", "fixed-delay:fail_after=1")),
            ("absent", "/no/such/folder"),
        ):
            hub.catalog.add_model(name, "1", source=source, context_tokens=2048)
        yield hub


@contextmanager
def without_sessions(base_url: str) -> Iterator[str]:
    """Yield a way to the hub that lets no WebSocket through, as proxies of some clusters do."""
    parts = urlsplit(base_url)
    target = (str(parts.hostname), int(parts.port or 80))
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if b"upgrade: websocket" in data.lower():
                    break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(target) as server:
            answers = threading.Thread(target=pump, args=(server, client), daemon=True)
            answers.start()
            pump(client, server)
            answers.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()


def test_two_launches_at_once_both_come_up_beside_each_other(user: User) -> None:
    """On one node, from two processes: neither takes the other's port, record or history."""
    with ThreadPoolExecutor(2) as pool:
        launching = [
            pool.submit(user.launch, "--wait", "--queue", "small", model="brought@1")
            for _ in range(2)
        ]
        launches = [one.result() for one in launching]
    assert [states(launch) for launch in launches] == [["ready"], ["ready"]]
    assert user.slurm.run("squeue", "-h", "-o", "%N").split() == ["n1", "n1"]
    told = [
        json.loads(path.read_text())
        for launch in launches
        for path in user.state.glob(f"launches/*/jobs/{launch['jobs'][0]['instance']}.json")
    ]
    assert len({status["direct_url"] for status in told}) == 2
    shown = json.loads(user.run("instances", "--format", "json").stdout)
    assert {one["name"] for one in shown} == {launch["name"] for launch in launches}
    assert len((user.state / "launches" / "history.jsonl").read_text().splitlines()) == 2
    assert {one.instance for one in user.fabric.instances() if one.connected} == {
        launch["jobs"][0]["instance"] for launch in launches
    }


def test_missing_weights_fail_before_anything_is_started(user: User) -> None:
    args = ("launch", "absent@1", "--site", MACHINE, *WALLTIME, "--wait")
    done = user.run(*args)
    assert done.returncode != 0
    reason = "The weights of absent@1 are not at '/no/such/folder' on the node n"
    assert reason in re.sub(r"\s+", " ", done.stderr)
    (launch,) = json.loads(user.run("instances", "--all", "--format", "json").stdout)
    assert states(launch) == ["failed"]
    assert reason in launch["jobs"][0]["detail"]
    assert len(user.log_of(launch["jobs"][0]).splitlines()) == 1


def test_a_canary_that_fails_keeps_the_instance_out_of_the_pool(user: User) -> None:
    args = ("launch", "mute@1", "--site", MACHINE, *WALLTIME, "--wait")
    done = user.run(*args, "--module", "fabric.testing.instance")
    assert done.returncode != 0
    assert "its canary failed: " in re.sub(r"\s+", " ", done.stderr)
    (launch,) = json.loads(user.run("instances", "--all", "--format", "json").stdout)
    assert states(launch) == ["failed"]
    assert not [one for one in user.fabric.instances() if one.connected]


def test_a_hub_that_nodes_cannot_reach_ends_the_launch_with_the_reason(
    hub: RunningHub, slurm: Slurm, tmp_path: Path
) -> None:
    with without_sessions(hub.base_url) as url:
        user = User(hub, slurm, tmp_path, hub_url=url)
        try:
            args = ("launch", "brought@1", "--site", MACHINE, *WALLTIME, "--wait")
            done = user.run(
                *(*args, "--module", "fabric.testing.instance", "--join-within", "2s"),
                *("--keep-alive-until", "1h"),
            )
            assert done.returncode != 0
            said = re.sub(r"\s+", " ", done.stderr)
            assert "could not reach the hub at ws://127.0.0.1" in said, said
            (launch,) = json.loads(user.run("instances", "--all", "--format", "json").stdout)
            # However long it is wanted: three tries in a row, and no more.
            assert states(launch) == ["failed"] * 3
            assert "could not reach the hub" in launch["detail"]
            assert "the hub cannot be reached" in user.log_of(launch["jobs"][0])
            assert slurm.run("squeue", "-h") == ""
        finally:
            user.end_all()
