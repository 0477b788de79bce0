"""``/v1/files`` and ``/v1/batches``: OpenAI's, for the caller's own project."""

from __future__ import annotations

import asyncio
from datetime import datetime
from functools import partial
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, StringConstraints
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from fabric.batches import COMPLETION_WINDOW, Batches, BatchRecord, FileRecord
from fabric.errors import NotFound, RequestCancelled, RequestInvalid, UnsupportedParameter
from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.hub import caller_of, hub_of
from fabric.gateway.openai_fields import Body
from fabric.gateway.replies import Json

FILES_PATH = "/v1/files"
ENVELOPE_BYTES = 2**20
"""What a form may have around its file."""
MIN_TTL_S, MAX_TTL_S = 3600, 30 * 86_400

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(Needs("query"))])

Limit = Annotated[int, Query(ge=1)]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(Body):
    """When a file ends, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_TTL_S, le=MAX_TTL_S)


class BatchBody(Body):
    """``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


def batches_of(request: Request) -> Batches:
    """Return the hub's batches.

    Raises:
        NotFound: This hub has none.
    """
    batches = cast("Batches | None", request.app.state.batches)
    if batches is None:
        raise NotFound(kind="route", name=f"{request.method} {request.url.path}")
    return batches


def limits_of(batches: Batches) -> dict[str, int]:
    """Return the paths whose bodies may be larger than others, and how large."""
    return {FILES_PATH: batches.settings.file_bytes + ENVELOPE_BYTES}


# ---- files ---------------------------------------------------------------------------------------


@router.post("/files")
async def create_file(request: Request) -> Json:
    """Keep an uploaded file (a form with ``file`` and ``purpose``)."""
    batches, caller = batches_of(request), caller_of(request)
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise RequestInvalid(param="file", value=None, reason="send a form with a file")
            if purpose != "batch":
                reason = "files are for batches here; send batch"
                raise UnsupportedParameter(param="purpose", value=purpose, reason=reason)
            ttl_s = _read_ttl_s(form.get("expires_after[seconds]"))
            # Copied, row and all, beside the loop: the disk may be slow.
            keep = partial(batches.upload, caller.project, file.file, ttl_s=ttl_s)
            filename = (file.filename or "upload.jsonl")[:255]
            return to_file(await asyncio.to_thread(keep, filename=filename))
    except ClientDisconnect:
        raise RequestCancelled from None
    except HTTPException as error:
        # What Starlette says of a form that it cannot read.
        raise RequestInvalid(param="file", value=None, reason=str(error.detail)) from None


@router.get("/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Json:
    """Return the project's files."""
    records = await hub_of(request).offload(
        batches_of(request).files.listed,
        caller_of(request).project,
        purpose=purpose,
        after=after,
        oldest_first=order == "asc",
    )
    return _listing([to_file(record) for record in records[:limit]], len(records) > limit)


@router.get("/files/{file}")
async def retrieve_file(request: Request, file: str) -> Json:
    """Return what is known of a file."""
    return to_file(await _get_file(request, file))


@router.get("/files/{file}/content")
async def retrieve_content(request: Request, file: str) -> FileResponse:
    """Return a file's contents."""
    record = await _get_file(request, file)
    path = batches_of(request).files.path(record.id)
    if not path.exists():
        raise NotFound(kind="file", name=file)
    return FileResponse(path, media_type="application/jsonl")


@router.delete("/files/{file}")
async def delete_file(request: Request, file: str) -> Json:
    """Remove a file that no batch is reading."""
    project = caller_of(request).project
    await hub_of(request).offload(batches_of(request).files.delete, file, project=project)
    return {"id": file, "object": "file", "deleted": True}


# ---- batches -------------------------------------------------------------------------------------


@router.post("/batches", openapi_extra=documented(BatchBody))
async def create_batch(request: Request) -> Json:
    """Begin a batch."""
    body = await read_body(request, BatchBody)
    expiry = body.output_expires_after
    record = await batches_of(request).create(
        caller_of(request),
        input_file=body.input_file_id,
        endpoint=body.endpoint,
        metadata=body.metadata or {},
        output_ttl_s=None if expiry is None else float(expiry.seconds),
    )
    return to_batch(record)


@router.get("/batches")
async def list_batches(
    request: Request, after: str | None = None, limit: Annotated[Limit, Query(le=100)] = 20
) -> Json:
    """Return the project's batches, newest first."""
    project = caller_of(request).project
    records = await hub_of(request).offload(
        batches_of(request).book.listed, project, after=after, limit=limit + 1
    )
    return _listing([to_batch(record) for record in records[:limit]], len(records) > limit)


@router.get("/batches/{batch}")
async def retrieve_batch(request: Request, batch: str) -> Json:
    """Return a batch as it is now."""
    project = caller_of(request).project
    book = batches_of(request).book
    return to_batch(await hub_of(request).offload(book.get, batch, project=project))


@router.post("/batches/{batch}/cancel")
async def cancel_batch(request: Request, batch: str) -> Json:
    """End a batch early; what was answered stays."""
    project = caller_of(request).project
    return to_batch(await batches_of(request).cancel(batch, project=project))


# ---- shapes --------------------------------------------------------------------------------------


def to_file(record: FileRecord) -> Json:
    """Return OpenAI's object of a file."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": _epoch_s(record.created_at),
        "expires_at": _epoch_s(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


def to_batch(record: BatchRecord) -> Json:
    """Return OpenAI's object of a batch; ``fabric`` is ours."""
    ended_at = _epoch_s(record.ended_at)
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model,
        "errors": {"object": "list", "data": record.errors} if record.errors else None,
        "input_file_id": record.input_file,
        "completion_window": COMPLETION_WINDOW,
        "status": record.status,
        "output_file_id": record.output_file,
        "error_file_id": record.error_file,
        "created_at": _epoch_s(record.created_at),
        "in_progress_at": _epoch_s(record.in_progress_at),
        "expires_at": _epoch_s(record.expires_at),
        "finalizing_at": _epoch_s(record.finalizing_at),
        "cancelling_at": _epoch_s(record.cancelling_at),
        **{
            f"{status}_at": ended_at if record.status == status else None
            for status in ("completed", "failed", "expired", "cancelled")
        },
        "request_counts": {
            "total": record.num_lines,
            "completed": record.num_completed,
            "failed": record.num_failed,
        },
        "metadata": dict(record.metadata) or None,
        "fabric": {"charge_usu": record.charge_usu},
    }


async def _get_file(request: Request, file: str) -> FileRecord:
    project = caller_of(request).project
    return await hub_of(request).offload(batches_of(request).files.get, file, project=project)


def _listing(data: list[Json], has_more: bool) -> Json:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def _epoch_s(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


def _read_ttl_s(value: object) -> float | None:
    if value is None:
        return None
    text = str(value)
    if not (text.isascii() and text.isdecimal()) or not MIN_TTL_S <= int(text) <= MAX_TTL_S:
        raise RequestInvalid(
            param="expires_after.seconds",
            value=text,
            reason=f"it is a whole number from {MIN_TTL_S} to {MAX_TTL_S}",
        )
    return float(text)
