"""Adapters and other low-rank changes of a model's weights."""

from __future__ import annotations

from fabric.errors.admission import AdmissionError
from fabric.errors.compute import EngineError


class LowRankInvalid(AdmissionError):
    """Factors do not fit the layer of the model that they are for."""

    code = "low_rank_invalid"

    def __init__(self, *, layer: str, reason: str) -> None:
        super().__init__(
            f"The low-rank change of the layer {layer!r} is refused: {reason}. Make it for this"
            " version of the model.",
            layer=layer,
            reason=reason,
        )


class AdapterInvalid(AdmissionError):
    """An adapter is not one that can be served, or not one for this model."""

    code = "adapter_invalid"

    def __init__(self, *, adapter: str, reason: str) -> None:
        super().__init__(
            f"The adapter {adapter!r} is refused: {reason}.",
            param="adapter",
            adapter=adapter,
            reason=reason,
        )


class AdaptersFull(AdmissionError):
    """A project keeps as many adapters as it may, by number or by bytes."""

    code = "adapters_full"
    http_status = 413

    def __init__(self, *, what: str, limit: int) -> None:
        super().__init__(
            f"With this adapter the project would keep more than {limit} {what} of adapters; delete"
            " one that is not needed any more (`fabric adapter delete`).",
            what=what,
            limit=limit,
        )


class AdapterMemoryFull(EngineError):
    """The adapters of running requests leave an instance no memory for another one."""

    code = "adapter_memory_full"
    http_status = 503
    retryable = True

    def __init__(self, *, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"The adapter takes {needed_bytes} bytes, and those of running requests leave it too"
            f" little of the instance's {limit_bytes} (engine.adapter_bytes). Try again later, or"
            " use a smaller rank.",
            needed_bytes=needed_bytes,
            limit_bytes=limit_bytes,
        )


class AdapterUnavailable(EngineError):
    """An instance could not get an adapter's contents."""

    code = "adapter_unavailable"
    http_status = 503
    retryable = True

    def __init__(self, *, digest: str, reason: str) -> None:
        super().__init__(
            f"The instance could not get the adapter {digest}: {reason}. Try again; if it goes on,"
            " upload the adapter again.",
            digest=digest,
            reason=reason,
        )
