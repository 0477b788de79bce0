"""Where an instance gets adapters: the node's disk, or the hub."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from logging import getLogger
from pathlib import Path

import httpx

from fabric.errors import AdapterUnavailable
from fabric.payloads.lora import digest_of

CACHE_BYTES = 4 * 2**30
"""What adapters may take on the node's disk; those read longest ago go first."""
MAX_BYTES = 2**30
TIMEOUT_S = 30.0
"""How long the hub may say nothing."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

logger = getLogger(__name__)


class AdapterFiles:
    """Adapters by digest, as an instance's engine asks for them; everything here blocks.

    What lies on the disk is believed only if its digest says so.

    Args:
        session_url: The hub's session route; the files are beside it.
        token: The launch token.
        directory: Where files are kept; instances of a site may share it.
        cache_bytes: What they may take there.
    """

    def __init__(
        self, session_url: str, token: str, directory: Path, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        base_url = f"http{session_url.removeprefix('ws')}".removesuffix("/session")
        self._url = f"{base_url}/adapter-files/"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._directory = directory
        self._cache_bytes = cache_bytes

    def __call__(self, digest: str) -> bytes:
        """Return an adapter's file.

        Raises:
            AdapterUnavailable: The hub cannot be reached, or has not this adapter (any more).
        """
        path = self._directory / digest.replace(":", "-")
        with suppress(OSError):
            data = path.read_bytes()
            if digest_of(data) == digest:
                os.utime(path)
                return data
            logger.warning("an adapter on the disk is damaged", extra={"digest": digest})
            path.unlink()
        data = self._fetch(digest)
        if (actual := digest_of(data)) != digest:
            raise AdapterUnavailable(digest=digest, reason=f"the hub sent {actual}")
        try:
            self._keep(path, data)
        except OSError as error:
            logger.warning("an adapter is not kept: %s", error, extra={"digest": digest})
        return data

    def _fetch(self, digest: str) -> bytes:
        # A cluster's web proxy cannot reach this machine's own loopback.
        trust_env = httpx.URL(self._url).host not in _LOOPBACK
        try:
            with (
                httpx.Client(timeout=TIMEOUT_S, trust_env=trust_env) as client,
                client.stream("GET", self._url + digest, headers=self._headers) as reply,
            ):
                if reply.status_code != httpx.codes.OK:
                    raise AdapterUnavailable(
                        digest=digest, reason=f"the hub answered {reply.status_code}"
                    )
                data = bytearray()
                for piece in reply.iter_bytes():
                    data += piece
                    if len(data) > MAX_BYTES:
                        raise AdapterUnavailable(
                            digest=digest, reason=f"it has more than {MAX_BYTES} bytes"
                        )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise AdapterUnavailable(digest=digest, reason=reason) from error
        return bytes(data)

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a file, whole or not at all, and remove the oldest that it leaves no room for."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self._directory, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
        self._remove_oldest(keep=path)

    def _remove_oldest(self, *, keep: Path) -> None:
        kept = []
        for path in self._directory.glob("blake3-*"):
            with suppress(FileNotFoundError):  # another instance has removed it
                stat = path.stat()
                kept.append((stat.st_mtime, stat.st_size, path))
        excess_bytes = sum(num_bytes for _, num_bytes, _ in kept) - self._cache_bytes
        for _, num_bytes, path in sorted(kept):
            if excess_bytes <= 0:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                excess_bytes -= num_bytes
