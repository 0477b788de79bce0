"""Ports on loopback for servers that are told their port."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Below what Linux takes for outgoing connections, so that none of them sits on a port of ours
# while its server is down.
PORTS = range(15_000, 32_000)


def free_port() -> int:
    """Return a port that nobody listens on."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 200 ports between {PORTS.start} and {PORTS.stop} is free")


def listener(port: int) -> socket.socket:
    """Return a socket that is bound to a reserved port; see ``reserved_port``."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port that stays ours while no server of ours listens on it.

    Connections to it are then refused. The server binds it with ``listener``.
    """
    with listener(0) as reservation:
        yield int(reservation.getsockname()[1])
