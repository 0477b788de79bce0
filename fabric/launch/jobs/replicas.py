"""Weights from jobs that serve the same version already: found by the hub, measured, not believed.

What they send is held against its digest; one that is gone or has sent something else is not asked
again, and its part comes from the next, or from where the weights are.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from fabric.errors import FabricError, HubUnreachable, ManifestInvalid
from fabric.launch.jobs.records import write_whole
from fabric.messages.weights import WeightsSource
from fabric.payloads.manifest import FileSource, Manifest, get_manifest

MANIFEST_PATH = "/manifest"
WEIGHTS_PATH = "/v1/fabric/instance/weights"

ASK_S = 10.0
"""How long the hub may take to say who has the weights."""

CONNECT_S = 5.0
STALL_S = 20.0
"""A replica that sends nothing for so long is gone."""

MAX_ASKED = 3
PROBE_BYTES = 2**24
MAX_MANIFEST_BYTES = 2**24

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_sources = TypeAdapter(tuple[WeightsSource, ...])
logger = logging.getLogger(__name__)


def ask_hub(
    hub_url: str, token: str, *, offer: Mapping[str, str] | None = None
) -> tuple[WeightsSource, ...]:
    """Return who gives the weights of a launch; with an offer, say instead that its job does.

    Raises:
        HubUnreachable: The hub does not answer, or does not know of such things.
    """
    import httpx

    # A cluster's web proxy cannot reach this machine's own loopback.
    trust_env = urlsplit(hub_url).hostname not in _LOOPBACK
    headers = {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(headers=headers, timeout=ASK_S, trust_env=trust_env) as client:
            url = hub_url.rstrip("/") + WEIGHTS_PATH
            reply = client.get(url) if offer is None else client.put(url, json=offer)
            reply.raise_for_status()
            return () if offer is not None else _sources.validate_python(reply.json()["data"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise HubUnreachable(url=hub_url, reason=f"weights: {error}") from error


class Replica:
    """One that gives.

    Args:
        source: Where it is, and the ticket for it.
    """

    def __init__(self, source: WeightsSource) -> None:
        self.source = source
        self.name = source.instance

    def measure(self) -> tuple[Manifest, float]:
        """Return what it has, and how fast it sends, in GB/s.

        Raises:
            OSError: It cannot be reached, or does not give.
            HTTPException: It is gone in the middle.
            ManifestInvalid: It says nonsense of what it has.
        """
        with self._get(MANIFEST_PATH) as reply:
            told = reply.read(MAX_MANIFEST_BYTES)
        try:
            manifest = get_manifest(json.loads(told))
        except ValueError as error:
            raise ManifestInvalid(where=self.name, reason=str(error)) from error
        largest = max(manifest.files, key=lambda file: file.size_bytes)
        began_at = time.perf_counter()
        with self.open(largest, 0) as reply:
            num_bytes = len(reply.read(PROBE_BYTES))
        return manifest, num_bytes / 1e9 / (time.perf_counter() - began_at)

    def open(self, file: FileSource, at: int) -> HTTPResponse:
        """Return a file's bytes from ``at`` on.

        Raises:
            OSError: It does not give them.
        """
        return self._get(f"/{file.sha256}", {"Range": f"bytes={at}-"})

    def _get(self, path: str, headers: Mapping[str, str] = {}) -> HTTPResponse:
        to = urlsplit(self.source.url)
        connection = HTTPConnection(str(to.hostname), to.port, timeout=CONNECT_S)
        ticket = {"Authorization": f"Bearer {self.source.ticket}"}
        try:
            connection.connect()
            connection.sock.settimeout(STALL_S)
            connection.request("GET", path, headers={**ticket, **headers})
            reply = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        if reply.status not in (200, 206):
            reply.close()
            raise ConnectionError(f"it answered {reply.status}")
        return reply


class _Stream(io.BufferedIOBase):
    """What a replica sends; the end of it is an end, whatever its cause. Counts the bytes."""

    def __init__(self, reply: HTTPResponse, count: Callable[[int], None]) -> None:
        self._reply = reply
        self._count = count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            num_bytes = self._reply.readinto(buffer)
        except (OSError, HTTPException) as error:
            logger.info("a replica ended: %s", error)
            return 0
        self._count(num_bytes)
        return num_bytes

    def close(self) -> None:
        self._reply.close()
        super().close()


class Replicas:
    """Who gives, the fastest first: a ``fabric.payloads.replicate.Nearer``.

    Args:
        replicas: Those that are asked, in this order.
        say: Told who is given up, and why.
        manifest: What the first says it has.
        gb_s: How fast it sends.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        say: Callable[[str], None],
        *,
        manifest: Manifest | None = None,
        gb_s: float = 0.0,
    ) -> None:
        self._left = list(replicas)
        self._say = say
        self._giver: tuple[str, Replica] | None = None
        self.manifest = manifest
        self.gb_s = gb_s
        self.given_bytes: Counter[str] = Counter()

    @property
    def giver(self) -> str | None:
        """Who gives now."""
        return None if self._giver is None else self._giver[1].name

    def describe(self) -> str:
        """Return who has given how much, in words."""
        parts = [f"{num / 1e9:.3g} GB from {name}" for name, num in self.given_bytes.items()]
        return ", " + " and ".join(parts) if parts else ""

    def open(self, file: FileSource, at: int) -> io.BufferedIOBase | None:
        """Return a file's bytes. See ``Nearer.open``."""
        if self._giver is not None and self._giver[0] == file.path:
            self._give_up(self._giver[1], f"it ended at {at:,} bytes of {file.path}")
        while self._left:
            replica = self._left[0]
            try:
                reply = replica.open(file, at)
            except OSError as error:
                self._give_up(replica, str(error))
                continue
            self._giver = (file.path, replica)
            return _Stream(reply, partial(self._count, replica.name))
        self._giver = None
        return None

    def distrust(self, file: FileSource) -> bool:
        """Give up who gave of a file. See ``Nearer.distrust``."""
        if self._giver is None or self._giver[0] != file.path:
            return False
        liar = self._giver[1]
        self._give_up(liar, f"what it sent of {file.path} is not {file.digest}")
        del self.given_bytes[liar.name]
        return True

    def write(self, path: Path) -> Path:
        """Keep who is asked in a file, for the job's further nodes; return it."""
        told = _sources.dump_json(tuple(one.source for one in self._left))
        write_whole(path, told.decode())
        return path

    @classmethod
    def read(cls, path: Path, say: Callable[[str], None]) -> Replicas:
        """Return those that ``write`` has kept."""
        return cls([Replica(one) for one in _sources.validate_json(path.read_bytes())], say)

    def _give_up(self, replica: Replica, reason: str) -> None:
        self._left.remove(replica)
        self._giver = None
        self._say(f"weights: no more from {replica.name}: {reason}")

    def _count(self, name: str, num_bytes: int) -> None:
        self.given_bytes[name] += num_bytes


def find_replicas(hub_url: str, token: str, say: Callable[[str], None]) -> Replicas | None:
    """Return the replicas that give a launch its weights; ``None`` if none does.

    Args:
        hub_url: The hub's address.
        token: The launch token.
        say: Told who does not give, and why.
    """
    try:
        sources = ask_hub(hub_url, token)[:MAX_ASKED]
    except FabricError as error:
        say(f"weights: no replica is asked: {error.message}")
        return None
    measured = sorted(_measure(map(Replica, sources), say), key=lambda one: -one[2])
    if not measured:
        return None
    _, manifest, gb_s = measured[0]
    return Replicas([one for one, _, _ in measured], say, manifest=manifest, gb_s=gb_s)


def _measure(
    replicas: Iterable[Replica], say: Callable[[str], None]
) -> Iterator[tuple[Replica, Manifest, float]]:
    for replica in replicas:
        try:
            yield replica, *replica.measure()
        except (OSError, HTTPException, ManifestInvalid) as error:
            say(f"weights: none from {replica.name}: {error}")
