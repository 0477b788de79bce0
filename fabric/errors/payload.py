"""Tensors and objects on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from fabric.errors.base import FabricError


class PayloadError(FabricError):
    """A tensor or an object on the wire is not what it declares to be, or cannot be fetched."""

    code = "payload_error"
    http_status = 400


class PayloadInvalid(PayloadError):
    """A value cannot be a payload, or bytes are not one."""

    code = "payload_invalid"

    def __init__(self, *, what: str, reason: str) -> None:
        super().__init__(f"{what} is refused: {reason}.", what=what, reason=reason)


class PayloadTooLarge(PayloadError):
    """A payload is over the size its way allows."""

    code = "payload_too_large"
    http_status = 413

    def __init__(self, *, size_bytes: int, cap_bytes: int, remedy: str) -> None:
        super().__init__(
            f"The payload has {size_bytes} bytes and at most {cap_bytes} are allowed here;"
            f" {remedy}.",
            size_bytes=size_bytes,
            cap_bytes=cap_bytes,
            remedy=remedy,
        )


class PayloadMissing(PayloadError):
    """A reference leads to nothing; the same request, made again, stores its result anew."""

    code = "payload_missing"
    http_status = 410
    retryable = True

    def __init__(self, *, store: str, key: str, reason: str) -> None:
        super().__init__(
            f"The payload {key} is not in the store {store!r}: {reason}. Ask for the result again,"
            " and read it before it expires.",
            store=store,
            key=key,
            reason=reason,
        )


class PayloadDamaged(PayloadError):
    """A store gave other bytes than the reference promises."""

    code = "payload_damaged"
    http_status = 502
    retryable = True

    def __init__(self, *, store: str, key: str, expected: str, actual: str) -> None:
        super().__init__(
            f"The store {store!r} gave {actual} for the payload {key}, which should be {expected};"
            " it is refused. Ask for the result again, and check the store if it goes on.",
            store=store,
            key=key,
            expected=expected,
            actual=actual,
        )


class UnknownStore(PayloadError):
    """A reference names a store that is not configured in this process."""

    code = "unknown_store"

    def __init__(self, *, store: str, kind: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"No {kind} store called {store!r} is configured here (there is"
            f" {', '.join(names) or 'none'}); configure it as at the place that made the"
            " reference.",
            store=store,
            kind=kind,
            known=names,
        )


class StoreUnreachable(PayloadError):
    """A store does not answer, or refuses to work."""

    code = "store_unreachable"
    http_status = 503
    retryable = True

    def __init__(self, *, store: str, kind: str, reason: str) -> None:
        super().__init__(
            f"The {kind} store {store!r} cannot be used: {reason}. Check that it runs and can be"
            " reached from here.",
            store=store,
            kind=kind,
            reason=reason,
        )
