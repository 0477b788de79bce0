"""Batches: many requests in one file, answered when there is room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fabric.errors import RequestInvalid
from fabric.sdk.records import Record
from fabric.sdk.results import Json

if TYPE_CHECKING:
    from fabric.sdk.transport import Transport

FINAL = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Record):
    """A batch as it is now; ``charge_usu`` is what its answers cost so far.

    ``errors`` say why a batch failed; what became of single requests is in their files. Times are
    seconds since 1970.
    """

    id: str
    status: str
    endpoint: str
    model: str | None
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    num_lines: int
    num_completed: int
    num_failed: int
    charge_usu: int
    errors: tuple[Json, ...]
    created_at: int
    expires_at: int

    @classmethod
    def from_reply(cls, reply: Json) -> Self:
        """Return the batch of OpenAI's object."""
        counts = reply["request_counts"]
        return super(Batch, cls).from_reply(
            {
                **reply,
                "num_lines": counts["total"],
                "num_completed": counts["completed"],
                "num_failed": counts["failed"],
                "charge_usu": reply["fabric"]["charge_usu"],
                "errors": tuple((reply["errors"] or {"data": ()})["data"]),
            }
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in FINAL


async def submit(
    transport: Transport, path: Path, endpoint: str | None, metadata: Mapping[str, str] | None
) -> Batch:
    """Upload a file and begin its batch. See ``Fabric.batch``."""
    try:
        with path.open("rb") as file:
            endpoint = endpoint or _endpoint_of(path, file.readline())
            file.seek(0)
            form = {"purpose": "batch"}
            uploaded = await transport.upload("/v1/files", {"file": (path.name, file)}, form)
    except OSError as error:
        raise RequestInvalid(param="file", value=str(path), reason=str(error)) from error
    body = {
        "input_file_id": uploaded["id"],
        "endpoint": endpoint,
        "completion_window": "24h",
        "metadata": dict(metadata or {}),
    }
    return Batch.from_reply(await transport.post("/v1/batches", body))


async def results(transport: Transport, batch: Batch) -> tuple[Json, ...]:
    """Return the lines of the output and error files. See ``Fabric.batch_results``."""
    lines: list[Json] = []
    for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
        text = await transport.get_text(f"/v1/files/{file_id}/content")
        lines += [json.loads(line) for line in text.splitlines()]
    return tuple(lines)


def _endpoint_of(path: Path, line: bytes) -> str:
    """Return the endpoint that the first request of a file is for."""
    try:
        first: Any = json.loads(line)
        return str(first["url"])
    except (ValueError, TypeError, KeyError):
        reason = "its first line should be a request: custom_id, method, url and body"
        raise RequestInvalid(param="file", value=str(path), reason=reason) from None
