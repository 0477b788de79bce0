"""Payloads kept where another process can fetch them, through ProxyStore's connectors.

ProxyStore's own serializer unpickles; ours never does. What travels is a ``Reference``: plain JSON
that names a store both ends have configured, so that nobody can point us at a place of theirs.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AwareDatetime, Field, StringConstraints

from fabric.config import FileStore, StoreConfig
from fabric.errors import (
    PayloadDamaged,
    PayloadMissing,
    PayloadTooLarge,
    StoreUnreachable,
    UnknownStore,
)
from fabric.messages.wire import Wire
from fabric.payloads.codec import DEFAULT_BOUNDS, Bounds, decode, encode

if TYPE_CHECKING:
    from proxystore.proxy import Proxy
    from proxystore.store import Store
    from proxystore.store.types import ConnectorKeyT

T = TypeVar("T")
Answer = TypeVar("Answer")

SWEEP_PERIOD_S = 60.0

ObjectId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]


class Reference(Wire):
    """Where a payload is and what it must be.

    ``key`` is the object's id and, for a ProxyStore endpoint, then the endpoint's: ids alone, so
    that no key leads out of a store. ``digest`` is of the encoded payload.
    """

    store: str
    kind: Literal["file", "redis", "endpoint"]
    key: tuple[ObjectId, ...] = Field(min_length=1, max_length=2)
    size_bytes: int = Field(ge=0)
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    expires_at: AwareDatetime


class PayloadStore:
    """One configured store. Threads may share it; it connects when it is first used.

    Closing it leaves its objects where they are: they go when they are evicted or expire.

    Args:
        config: Which store; the same at both ends.
        bounds: What is accepted on reading.
    """

    def __init__(self, config: StoreConfig, *, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self.config = config
        self._bounds = bounds
        self._lock = threading.Lock()
        self._store: Store[Any] | None = None
        self._swept_at = float("-inf")
        self._put: dict[tuple[str, ...], Reference] = {}

    def __enter__(self) -> PayloadStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; the next use connects again."""
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def put(self, value: Any) -> Reference:
        """Keep a payload and return where it is.

        Raises:
            PayloadInvalid: The value cannot be a payload.
            PayloadTooLarge: It is over what the store takes.
            StoreUnreachable: The store does not work.
        """
        return self.put_encoded(encode(value))

    def put_encoded(self, data: bytes) -> Reference:
        """Keep a payload that ``encode`` has written.

        Raises:
            PayloadTooLarge: It is over what the store takes.
            StoreUnreachable: The store does not work.
        """
        if len(data) > self.config.max_bytes:
            raise PayloadTooLarge(
                size_bytes=len(data),
                cap_bytes=self.config.max_bytes,
                remedy=f"raise max_bytes of the store {self.config.name!r} or use another kind",
            )
        if time.monotonic() > self._swept_at + SWEEP_PERIOD_S:
            self.sweep()
        expires_at = datetime.now(UTC) + timedelta(seconds=self.config.ttl_s)
        key = self._ask(lambda store: store.put(data, serializer=bytes))
        reference = Reference(
            store=self.config.name,
            kind=self.config.kind,
            key=tuple(key),
            size_bytes=len(data),
            digest=_digest_of(data),
            expires_at=expires_at,
        )
        if self.config.kind == "endpoint":
            self._put[reference.key] = reference
        return reference

    def resolve(self, reference: Reference, *, evict: bool = False) -> Any:
        """Return a payload.

        Args:
            reference: As ``put`` gave it, at either end.
            evict: Whether this is the last reader.

        Raises:
            UnknownStore: The reference is to another store.
            PayloadMissing: The object was evicted, or has expired.
            PayloadDamaged: The bytes are not those that were put.
            PayloadTooLarge: It is over the bounds.
            PayloadInvalid: The bytes are no payload.
            StoreUnreachable: The store does not work.
        """
        key = self._key(reference)
        if reference.size_bytes > self._bounds.max_bytes:
            raise PayloadTooLarge(
                size_bytes=reference.size_bytes,
                cap_bytes=self._bounds.max_bytes,
                remedy="read it where the bounds are wider",
            )
        if reference.expires_at <= datetime.now(UTC):
            raise _missing(reference, f"it expired at {reference.expires_at.isoformat()}")
        data = self._ask(lambda store: store.get(key, deserializer=bytes))
        if data is None:
            raise _missing(reference, "it was evicted, or the store has lost it")
        value = decode_checked(data, reference=reference, bounds=self._bounds)
        if evict:
            self.evict(reference)
        return value

    def evict(self, reference: Reference) -> None:
        """Drop a payload; harmless when it is gone.

        Raises:
            UnknownStore: The reference is to another store.
            StoreUnreachable: The store does not work.
        """
        key = self._key(reference)
        self._ask(lambda store: store.evict(key))
        self._put.pop(reference.key, None)

    def proxy(self, value: T) -> Proxy[T]:
        """Keep a payload and return a ProxyStore proxy, for apps that pass those.

        The proxy resolves in any process that can import ``fabric`` and reach the store; bytes that
        are not those that were put make it fail.

        Raises:
            PayloadInvalid: As ``put``; so do the others.
        """
        reference = self.put(value)
        check = partial(decode_checked, reference=reference, bounds=self._bounds)
        key = self._key(reference)
        proxy: Proxy[T] = self._ask(lambda store: store.proxy_from_key(key, deserializer=check))
        return proxy

    def sweep(self) -> int:
        """Remove what has expired and return how many objects that were.

        Redis expires objects by itself. Of an endpoint's, which cannot be listed, a store knows
        those it put itself.

        Raises:
            StoreUnreachable: The store does not work.
        """
        self._swept_at = time.monotonic()
        if isinstance(config := self.config, FileStore):
            from fabric.payloads.connectors import sweep_files

            return self._ask(lambda _: sweep_files(config))
        now = datetime.now(UTC)
        expired = [one for one in list(self._put.values()) if one.expires_at <= now]
        for reference in expired:
            self.evict(reference)
        return len(expired)

    def _key(self, reference: Reference) -> ConnectorKeyT:
        """Return a reference's key as its connector has it."""
        config = self.config
        if (reference.store, reference.kind) != (config.name, config.kind):
            raise UnknownStore(store=reference.store, kind=reference.kind, known=[config.name])
        from fabric.payloads.connectors import get_key

        return get_key(config, reference.key)

    def _ask(self, question: Callable[[Store[Any]], Answer]) -> Answer:
        try:
            with self._lock:
                if self._store is None:
                    from fabric.payloads.connectors import open_store

                    self._store = open_store(self.config)
                store = self._store
            return question(store)
        except Exception as error:  # every connector has its own, and the endpoint's asserts
            raise StoreUnreachable(
                store=self.config.name,
                kind=self.config.kind,
                reason=f"{type(error).__name__}: {error}".removesuffix(": ").rstrip("."),
            ) from error


def decode_checked(data: bytes, *, reference: Reference, bounds: Bounds) -> Any:
    """Return a payload whose bytes are those of the reference.

    Raises:
        PayloadDamaged: They are not.
        PayloadInvalid: They are no payload.
    """
    actual = _digest_of(data) if len(data) == reference.size_bytes else f"{len(data)} bytes"
    if actual != reference.digest:
        raise PayloadDamaged(
            store=reference.store,
            key=reference.key[0],
            expected=f"{reference.size_bytes} bytes, {reference.digest}",
            actual=actual,
        )
    return decode(data, bounds)


def _digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _missing(reference: Reference, reason: str) -> PayloadMissing:
    return PayloadMissing(store=reference.store, key=reference.key[0], reason=reason)
