"""``/v1/fabric/adapters``: a project's own adapters, and their contents for instances."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import cast

from fastapi import APIRouter, Depends, Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from fabric.adapters import AdapterRecord, Adapters
from fabric.catalog import LaunchRecord
from fabric.errors import NotFound, RequestCancelled, RequestInvalid
from fabric.gateway.access import Needs, NeedsInstance
from fabric.gateway.fabric_routes import Listing
from fabric.gateway.hub import caller_of, hub_of
from fabric.gateway.replies import Json
from fabric.messages import AdapterName, ModelRef
from fabric.payloads.lora import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE

ADAPTERS_PATH = "/v1/fabric/adapters"
ENVELOPE_BYTES = MAX_CONFIG_BYTES + 2**20
"""What a form may have around the weights."""

router = APIRouter(prefix="/v1/fabric", tags=["adapters"], dependencies=[Depends(Needs("query"))])
instances = APIRouter(prefix="/v1/fabric", tags=["sites"], dependencies=[Depends(NeedsInstance())])

_name: TypeAdapter[str] = TypeAdapter(AdapterName)
_model: TypeAdapter[str] = TypeAdapter(ModelRef)


def limits_of(adapters: Adapters) -> dict[str, int]:
    """Return the paths whose bodies may be larger than others, and how large."""
    return {ADAPTERS_PATH: adapters.settings.file_bytes + ENVELOPE_BYTES}


@router.post("/adapters")
async def add_adapter(request: Request) -> AdapterRecord:
    """Keep an adapter: a form with ``name``, ``model`` and PEFT's two files, ``config`` and
    ``weights``."""
    adapters, hub, caller = _adapters_of(request), hub_of(request), caller_of(request)
    try:
        async with request.form(max_files=2, max_fields=8) as form:
            name, model = _read(form, "name", _name), _read(form, "model", _model)
            config = await _read_file(form, "config", CONFIG_FILE, MAX_CONFIG_BYTES)
            weights = await _read_file(form, "weights", WEIGHTS_FILE, adapters.settings.file_bytes)
    except ClientDisconnect:
        raise RequestCancelled from None
    except HTTPException as error:
        # What Starlette says of a form that it cannot read.
        raise RequestInvalid(param="weights", value=None, reason=str(error.detail)) from None
    version = await hub.offload((await hub.seen_by(caller)).resolve, model)
    # Beside the loop, and beside the database's thread: checking and hashing take their time.
    kept = partial(adapters.add, caller.project, name, model=version.ref)
    add = partial(kept, config=config, weights=weights)
    return await asyncio.to_thread(add)


@router.get("/adapters")
async def list_adapters(request: Request) -> Listing[AdapterRecord]:
    """Return the project's adapters."""
    adapters, project = _adapters_of(request), caller_of(request).project
    return Listing(data=await hub_of(request).offload(adapters.listed, project))


@router.get("/adapters/{name}")
async def read_adapter(request: Request, name: str) -> AdapterRecord:
    """Return what is known of an adapter."""
    adapters, project = _adapters_of(request), caller_of(request).project
    return await hub_of(request).offload(adapters.get, name, project=project)


@router.delete("/adapters/{name}")
async def delete_adapter(request: Request, name: str) -> Json:
    """Forget an adapter; what runs with it runs to its end."""
    adapters, project = _adapters_of(request), caller_of(request).project
    await hub_of(request).offload(adapters.delete, name, project=project)
    return {"name": name, "object": "adapter", "deleted": True}


@instances.get("/adapter-files/{digest}")
async def read_contents(request: Request, digest: str) -> FileResponse:
    """Return an adapter's file to an instance of the version that it was made for."""
    adapters, launch = _adapters_of(request), cast(LaunchRecord, request.state.launch)
    path = await hub_of(request).offload(adapters.contents, digest, model=launch.model)
    return FileResponse(path, media_type="application/octet-stream")


def _adapters_of(request: Request) -> Adapters:
    adapters = cast("Adapters | None", request.app.state.adapters)
    if adapters is None:
        raise NotFound(kind="route", name=f"{request.method} {request.url.path}")
    return adapters


def _read(form: FormData, field: str, kind: TypeAdapter[str]) -> str:
    value = form.get(field)
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise RequestInvalid(param=field, value=value, reason=reason) from None


async def _read_file(form: FormData, field: str, name: str, limit_bytes: int) -> bytes:
    file = form.get(field)
    if not isinstance(file, UploadFile):
        raise RequestInvalid(param=field, value=None, reason=f"send {name} as a file")
    if file.size is not None and file.size > limit_bytes:
        reason = f"it is over the {limit_bytes} bytes that it may have"
        raise RequestInvalid(param=field, value=f"{file.size} bytes", reason=reason)
    return await file.read()
