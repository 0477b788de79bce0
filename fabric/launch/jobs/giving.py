"""A job gives its copy of the weights to others: by digest, in ranges, to whoever has a ticket.

The process that watches the instance does it, so that no step of the engine waits for a copy. It
says where to the hub, which makes the tickets. Only a copy on the node's own disk is given: what
all nodes share they read themselves.
"""

from __future__ import annotations

import logging
import re
import secrets
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import cast

from fabric.errors import FabricError
from fabric.launch.jobs.nodes import get_address
from fabric.launch.jobs.replicas import MANIFEST_PATH, ask_hub
from fabric.launch.jobs.weights import read_manifest
from fabric.messages.weights import WeightsOffer, takes_ticket
from fabric.payloads.manifest import MANIFEST_FILE, Manifest

MAX_TRANSFERS = 4
"""Files given at once; who comes later reads elsewhere."""

STALL_S = 30.0
"""How long a taker may take nothing."""

SAY_S = 20.0
"""How often the hub is told again."""

_RANGE = re.compile(r"bytes=(\d{1,18})-")
logger = logging.getLogger(__name__)


class WeightsServer(socketserver.ThreadingTCPServer):
    """Gives the files of one version.

    Args:
        folder: The copy.
        manifest: What it has.
        host: The address to listen at.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, folder: Path, manifest: Manifest, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.manifest = manifest.model_dump_json().encode()
        self.files = {file.sha256: folder / file.path for file in manifest.files}
        self.slots = threading.BoundedSemaphore(MAX_TRANSFERS)
        self.offer = WeightsOffer(
            url=f"http://{host}:{self.server_address[1]}", key=secrets.token_hex(32)
        )


class _Handler(BaseHTTPRequestHandler):
    timeout = STALL_S

    def do_GET(self) -> None:
        server = cast(WeightsServer, self.server)
        ticket = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            if not takes_ticket(server.offer.key, ticket, time.time()):
                self.send_error(HTTPStatus.NOT_FOUND)
            elif self.path == MANIFEST_PATH:
                self._begin(HTTPStatus.OK, len(server.manifest))
                self.wfile.write(server.manifest)
            elif (path := server.files.get(self.path[1:])) is None:
                self.send_error(HTTPStatus.NOT_FOUND)
            elif not server.slots.acquire(blocking=False):
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            else:
                try:
                    self._give(path)
                finally:
                    server.slots.release()
        except OSError as error:
            logger.debug("a taker of weights has left: %s", error)
            self.close_connection = True

    def _give(self, path: Path) -> None:
        wanted = _RANGE.fullmatch(self.headers.get("Range", "bytes=0-"))
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
            if wanted is None or int(wanted[1]) > num_bytes:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            at = int(wanted[1])
            self._begin(HTTPStatus.PARTIAL_CONTENT, num_bytes - at)
            self.wfile.flush()
            self.connection.sendfile(file, at)

    def _begin(self, status: HTTPStatus, num_bytes: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(num_bytes))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)


@contextmanager
def giving(
    source: str, *, hub_url: str, token: str, interface: str | None, say: Callable[[str], None]
) -> Iterator[None]:
    """Give what a job's instance reads, if that is a copy on this node's disk.

    Args:
        source: Where the instance reads.
        hub_url: The hub's address.
        token: The launch token.
        interface: Where other nodes reach this one; its name by default.
        say: Told why nothing is given, for the log.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if not path.is_absolute() or not (folder / MANIFEST_FILE).is_file():
        yield
        return
    try:
        server = WeightsServer(
            folder, read_manifest(folder / MANIFEST_FILE), get_address(interface)
        )
    except (OSError, FabricError) as error:
        say(f"weights: given to nobody: {error}")
        yield
        return
    ended = threading.Event()

    def offer() -> None:
        body = server.offer.model_dump()
        while True:
            try:
                ask_hub(hub_url, token, offer=body)
            except FabricError as error:
                logger.info("%s", error.message)
            if ended.wait(SAY_S):
                return

    threads = [threading.Thread(target=one, daemon=True) for one in (server.serve_forever, offer)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
