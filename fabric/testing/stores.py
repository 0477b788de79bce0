"""Real stores for payloads: a Redis server and ProxyStore endpoints, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

from fabric.config import EndpointStore, RedisStore

START_S = 60.0


@contextmanager
def running_redis(directory: Path, *, name: str = "redis") -> Iterator[RedisStore]:
    """Run a Redis server that keeps nothing on disk.

    Args:
        directory: Where it works; made if missing.
        name: The store's name.
    """
    port = _free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    with _running(command, directory, os.environ, port):
        yield RedisStore(kind="redis", host="127.0.0.1", port=port, name=name)


@contextmanager
def running_endpoint(directory: Path, *, name: str = "endpoint") -> Iterator[EndpointStore]:
    """Run a ProxyStore endpoint without peers.

    Args:
        directory: ProxyStore's home; made if missing.
        name: The store's name.
    """
    with _running_endpoint(directory) as endpoint_id:
        yield EndpointStore(
            kind="endpoint", name=name, endpoints=(endpoint_id,), proxystore_dir=directory
        )


@contextmanager
def running_peers(
    directory: Path, *, name: str = "peers"
) -> Iterator[tuple[EndpointStore, EndpointStore]]:
    """Run two ProxyStore endpoints that know each other, and yield the store as each end sees it.

    Args:
        directory: Where they work; made if missing.
        name: The store's name.
    """
    port = _free_port()
    relay = [_program("proxystore-relay"), "--host", "127.0.0.1", "--port", str(port)]
    homes = directory / "here", directory / "there"
    with (
        _running(relay, directory, os.environ, port),
        _running_endpoint(homes[0], f"ws://127.0.0.1:{port}") as here,
        _running_endpoint(homes[1], f"ws://127.0.0.1:{port}") as there,
    ):
        one, other = (
            EndpointStore(kind="endpoint", name=name, endpoints=(here, there), proxystore_dir=home)
            for home in homes
        )
        yield one, other


@contextmanager
def _running_endpoint(directory: Path, relay: str | None = None) -> Iterator[UUID]:
    from proxystore.endpoint.config import EndpointConfig, EndpointRelayConfig, write_config

    port, endpoint_id = _free_port(), uuid4()
    config = EndpointConfig(
        name="store",
        uuid=str(endpoint_id),
        host="127.0.0.1",
        host_type="static",
        port=port,
        # Its own servers for finding a way through firewalls are public ones.
        relay=EndpointRelayConfig(address=relay, ice_servers=[]),
    )
    write_config(config, str(directory / "store"))
    environ = os.environ | {"PROXYSTORE_HOME": str(directory)}
    command = [_program("proxystore-endpoint"), "start", "store", "--no-detach"]
    with _running(command, directory, environ, port):
        yield endpoint_id


def _program(name: str) -> str:
    """Return a program beside this Python, which need not be on the PATH."""
    return str(Path(sys.executable).with_name(name))


@contextmanager
def _running(
    command: Sequence[str], directory: Path, environ: Mapping[str, str], port: int
) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    log_path = directory / "log"
    with (
        log_path.open("ab") as log,
        subprocess.Popen(
            command, cwd=directory, env=environ, stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            until = time.monotonic() + START_S
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} did not start: {log_path.read_text()}")
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
