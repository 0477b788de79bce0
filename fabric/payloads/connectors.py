"""ProxyStore's connectors as our stores need them; imported when a store is first used."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from proxystore.connectors.endpoint import EndpointConnector, EndpointKey
from proxystore.connectors.file import FileConnector, FileKey
from proxystore.connectors.protocols import Connector
from proxystore.connectors.redis import RedisConnector, RedisKey
from proxystore.serialize import BytesLike
from proxystore.store import Store
from proxystore.store.types import ConnectorKeyT

from fabric.config import EndpointStore, FileStore, RedisStore, StoreConfig
from fabric.errors import PayloadInvalid
from fabric.payloads.codec import decode, encode

OBJECT_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
"""How every connector names its objects."""


class ExpiringRedisConnector(RedisConnector):
    """A Redis connector whose objects expire.

    Args:
        hostname: The server.
        port: Its port.
        ttl_s: How long an object is kept.
        clear: As ProxyStore's: whether closing it empties the server.
    """

    def __init__(self, hostname: str, port: int, *, ttl_s: float, clear: bool = False) -> None:
        super().__init__(hostname, port, clear)
        self.ttl_s = ttl_s

    def config(self) -> dict[str, Any]:
        """Return the arguments that make this connector again."""
        return {**super().config(), "ttl_s": self.ttl_s}

    def put(self, obj: BytesLike) -> RedisKey:
        """Keep an object under a new key."""
        key = self.new_key()
        self.set(key, obj)
        return key

    def set(self, key: RedisKey, obj: BytesLike) -> None:
        """Keep an object under a key."""
        self._redis_client.set(key.redis_key, bytes(obj), px=max(1, round(self.ttl_s * 1000)))


def open_store(config: StoreConfig) -> Store[Any]:
    """Return a ProxyStore store with our serializer.

    Its name tells configurations apart: ProxyStore looks stores up by name, in every process.
    """
    mark = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
    return Store(
        f"{config.name}-{mark}",
        _open_connector(config),
        serializer=encode,
        deserializer=decode,
        cache_size=0,
        populate_target=False,
    )


def _open_connector(config: StoreConfig) -> Connector[Any]:
    match config:
        case FileStore():
            directory = config.directory.expanduser().absolute()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Else the directory, and what others still have to read there, goes with the store.
            return FileConnector(str(directory), clear=False)
        case RedisStore():
            return ExpiringRedisConnector(config.host, config.port, ttl_s=config.ttl_s)
        case EndpointStore():
            configs = config.proxystore_dir
            return EndpointConnector(config.endpoints, None if configs is None else str(configs))


def get_key(config: StoreConfig, key: Sequence[str]) -> ConnectorKeyT:
    """Return the key of a reference as the connector has it.

    Raises:
        PayloadInvalid: It is not of this kind of store, or of another endpoint.
    """
    match config, key:
        case FileStore(), [object_id]:
            return FileKey(object_id)
        case RedisStore(), [object_id]:
            return RedisKey(object_id)
        case EndpointStore(), [object_id, endpoint_id] if UUID(endpoint_id) in config.endpoints:
            return EndpointKey(object_id, endpoint_id)
    raise PayloadInvalid(
        what="A reference", reason=f"its key {list(key)} is none of the store {config.name!r}"
    )


def sweep_files(config: FileStore) -> int:
    """Remove the expired objects of a directory, half-written ones too; return how many."""
    expired_at = time.time() - config.ttl_s
    num_removed = 0
    # A reader looks for the mark of an object first, so marks go first.
    for path in sorted(config.directory.expanduser().glob("*"), key=_is_object):
        if re.fullmatch(rf"{OBJECT_ID}(\.ready)?", path.name) and _modified_at(path) < expired_at:
            path.unlink(missing_ok=True)
            num_removed += _is_object(path)
    return num_removed


def _is_object(path: Path) -> bool:
    return not path.suffix


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another sweep took it
        return float("inf")
