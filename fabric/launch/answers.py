"""Answers as they leave a worker: compact, and small enough for the service."""

from __future__ import annotations

import json
from typing import Any, cast

from pydantic import TypeAdapter

from fabric.config import load_store
from fabric.errors import PayloadError, PayloadTooLarge
from fabric.launch.rawcalls import get_error
from fabric.launch.rundir import RunDir
from fabric.messages import Event, Failed, Failure, Finished

CAP_BYTES = 5_000_000
"""What an answer may have as JSON. The service takes 10 MB of it in its own encoding."""

_events: TypeAdapter[Event] = TypeAdapter(Event)


def to_json(event: Event) -> dict[str, Any]:
    """Return an event without the fields that have their defaults: most of a token's."""
    return {"type": event.type, **event.model_dump(mode="json", exclude_defaults=True)}


def fit(answer: dict[str, Any], folder: RunDir) -> dict[str, Any]:
    """Return the answer, or what may leave a worker in its place."""
    size_bytes = len(json.dumps(answer))
    if size_bytes <= CAP_BYTES:
        return answer
    error: PayloadError = PayloadTooLarge(
        size_bytes=size_bytes,
        cap_bytes=CAP_BYTES,
        remedy="send fewer requests in a batch, ask for fewer tokens or log probabilities, or"
        " configure a store at the site",
    )
    config = load_store(folder.path)
    if config is not None:
        from fabric.payloads import PayloadStore, pack

        try:
            with PayloadStore(config) as store:
                packed = pack(answer, threshold_bytes=0, cap_bytes=CAP_BYTES, store=store)
                return cast(dict[str, Any], packed)
        except PayloadError as failed:
            error = failed
    return _cut(answer, size_bytes, error)


def _cut(answer: dict[str, Any], size_bytes: int, error: PayloadError) -> dict[str, Any]:
    """Fail the largest tasks until the others fit."""
    rows = list(answer["events"])
    results = list(answer.get("results", ()))
    sizes = {index: len(json.dumps(row)) for index, row in enumerate(rows)}
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        if size_bytes <= CAP_BYTES:
            break
        last = _events.validate_python(rows[index][-1])
        assert isinstance(last, Finished | Failed)
        failed = Failed(
            task_id=last.task_id,
            attempt=last.attempt,
            failure=Failure.of(error),
            usage=last.usage,
        )
        rows[index] = [to_json(failed)]
        size_bytes -= sizes[index] - len(json.dumps(rows[index]))
        if results:
            size_bytes -= len(json.dumps(results[index]))
            results[index] = get_error(error)
            size_bytes += len(json.dumps(results[index]))
    return {**answer, "events": rows, **({"results": results} if results else {})}
