"""A payload inside a JSON message: the value itself while it is small, else a reference.

An envelope is plain JSON, which stands for itself; ``{"$data": BASE64}`` for what JSON cannot hold;
or ``{"$ref": Reference}``.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from fabric.errors import PayloadInvalid, PayloadTooLarge, UnknownStore
from fabric.payloads.codec import DEFAULT_BOUNDS, Bounds, assemble, decode, flatten
from fabric.payloads.store import PayloadStore, Reference

THRESHOLD_BYTES = 5_000_000


def pack(
    value: Any,
    *,
    threshold_bytes: int = THRESHOLD_BYTES,
    cap_bytes: int,
    store: PayloadStore | None = None,
) -> Any:
    """Return a value as an envelope.

    Args:
        value: JSON, bytes and tensors.
        threshold_bytes: What is larger, as JSON, goes to the store if there is one.
        cap_bytes: What the message can carry at most.
        store: Where large values go.

    Raises:
        PayloadInvalid: The value cannot be a payload.
        PayloadTooLarge: It is over the cap and there is no store, or over what the store takes.
        StoreUnreachable: The store does not work.
    """
    text, tensors = flatten(value)
    data = assemble(text, tensors) if tensors or _is_envelope(value) else None
    size_bytes = len(text) if data is None else (len(data) + 2) // 3 * 4
    if store is not None and size_bytes > min(threshold_bytes, cap_bytes):
        reference = store.put_encoded(data or assemble(text, tensors))
        return {"$ref": reference.model_dump(mode="json")}
    if size_bytes > cap_bytes:
        raise PayloadTooLarge(
            size_bytes=size_bytes,
            cap_bytes=cap_bytes,
            remedy="configure a store in the site's file, or ask for less at once",
        )
    return value if data is None else {"$data": b64encode(data).decode()}


def unpack(
    envelope: Any,
    stores: Iterable[PayloadStore] = (),
    *,
    evict: bool = False,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Any:
    """Return the value of an envelope that came as JSON.

    Args:
        envelope: As ``pack`` made it.
        stores: Those that references may lead to.
        evict: Whether a value in a store is dropped there once it is read.
        bounds: What is accepted.

    Raises:
        PayloadInvalid: The envelope is malformed, or holds no payload.
        PayloadTooLarge: The value is over a bound.
        UnknownStore: A reference leads to none of the stores.
        PayloadMissing: The value is no longer in the store.
        PayloadDamaged: The store gave other bytes.
        StoreUnreachable: The store does not work.
    """
    match envelope:
        case {"$ref": fields, **rest} if not rest:
            reference = _get_reference(fields)
            known = {store.config.name: store for store in stores}
            if reference.store not in known:
                raise UnknownStore(store=reference.store, kind=reference.kind, known=known)
            return known[reference.store].resolve(reference, evict=evict)
        case {"$data": str(text), **rest} if not rest:
            return decode(_get_data(text, bounds), bounds)
        case {"$data": _, **rest} if not rest:
            raise PayloadInvalid(what="An envelope", reason="its $data is not a string")
    return envelope


def _is_envelope(value: Any) -> bool:
    return isinstance(value, dict) and list(value) in (["$ref"], ["$data"])


def _get_reference(fields: Any) -> Reference:
    try:
        return Reference.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PayloadInvalid(what="A reference", reason=f"{where} {first['msg']}") from error


def _get_data(text: str, bounds: Bounds) -> bytes:
    if len(text) * 3 // 4 > bounds.max_bytes:
        raise PayloadTooLarge(
            size_bytes=len(text) * 3 // 4,
            cap_bytes=bounds.max_bytes,
            remedy="send several smaller ones",
        )
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PayloadInvalid(what="An envelope", reason="its $data is not base64") from error
