"""The lines of output and error files, in OpenAI's shape."""

from __future__ import annotations

import hashlib
import json

from fabric.batches.answerer import Answer
from fabric.batches.records import BatchRecord, Json, Line
from fabric.errors import FabricError


def answered(batch: BatchRecord, line: Line, answer: Answer) -> str:
    """Return the line of an answer."""
    reply = {"status_code": 200, "request_id": answer.request_id, "body": answer.body}
    return _result(batch, line, response=reply)


def refused(batch: BatchRecord, line: Line, error: FabricError, body: Json) -> str:
    """Return the line of a request that was refused or failed."""
    reply = {"status_code": error.http_status, "request_id": _id(batch, line), "body": body}
    return _result(batch, line, response=reply)


def unasked(batch: BatchRecord, line: Line) -> str:
    """Return the line of a request that the batch ended without."""
    if batch.cancelling_at is not None:
        code, why = "batch_cancelled", "the batch was cancelled"
    elif batch.errors:
        code, why = str(batch.errors[0]["code"]), "the batch's caller may not ask any more"
    else:
        code, why = "batch_expired", "the completion window expired"
    message = f"This request was not answered before {why}; nothing was charged for it."
    return _result(batch, line, error={"code": code, "message": message})


def _result(
    batch: BatchRecord, line: Line, *, response: Json | None = None, error: Json | None = None
) -> str:
    return json.dumps(
        {
            "id": _id(batch, line),
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
    )


def _id(batch: BatchRecord, line: Line) -> str:
    digest = hashlib.sha256(f"{batch.id}:{line.number}".encode()).hexdigest()
    return f"batch_req_{digest[:32]}"
