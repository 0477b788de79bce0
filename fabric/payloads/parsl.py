"""Large arrays of Parsl apps by ProxyStore proxy, through a ``PayloadStore``. ::

with proxied_arguments(store):
    future = app(array)     # the workers fetch it from the store
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fabric.payloads.envelope import THRESHOLD_BYTES
from fabric.payloads.store import PayloadStore


@contextmanager
def proxied_arguments(
    store: PayloadStore, *, threshold_bytes: int = THRESHOLD_BYTES
) -> Iterator[None]:
    """Keep in a store the arrays and bytes that this process gives to Parsl apps.

    It is for the submitting process; workers need nothing but ``fabric`` and the store. An app
    returns a large result as ``store.proxy(result)``. While it holds, all of the process's Parsl
    executors use it.

    Args:
        store: Where they go; it stays open at least as long.
        threshold_bytes: What is larger is kept in the store.
    """
    from parsl.serialize import facade
    from parsl.serialize.concretes import DillSerializer
    from parsl.serialize.proxystore import ProxyStoreSerializer

    def is_large(value: Any) -> bool:
        # Proxies have their target's attributes, and asking for one would fetch it.
        size_bytes = len(value) if type(value) is bytes else _array_bytes(value)
        return size_bytes > threshold_bytes

    serializers = dict(facade.methods_for_data)
    # Parsl takes the first that works, and its own always does.
    facade.methods_for_data.clear()
    facade.register_method_for_data(ProxyStoreSerializer(store=store, should_proxy=is_large))
    facade.register_method_for_data(DillSerializer())
    try:
        yield
    finally:
        facade.methods_for_data.clear()
        facade.methods_for_data.update(serializers)


def _array_bytes(value: Any) -> int:
    if type(value).__module__.partition(".")[0] not in ("numpy", "torch"):
        return 0
    return int(getattr(value, "nbytes", 0))
