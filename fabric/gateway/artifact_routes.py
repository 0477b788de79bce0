"""``/v1/fabric/artifacts``: constants that programs are given, and results they left.

Instances have routes of their own, for the projects whose runs they have at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from fabric.artifacts import ArtifactRecord, Artifacts
from fabric.errors import NotFound, ProgramError, RequestCancelled
from fabric.gateway.access import Needs, NeedsInstance
from fabric.gateway.hub import caller_of, hub_of, launch_of
from fabric.gateway.replies import Json
from fabric.messages.program import MAX_CONSTS_BYTES
from fabric.programs import read_header
from fabric.sql import utc_now

ARTIFACTS_PATH = "/v1/fabric/artifacts"
INSTANCE_PATH = "/v1/fabric/instance/artifacts"

router = APIRouter(
    prefix="/v1/fabric", tags=["programs"], dependencies=[Depends(Needs("program:read"))]
)
instances = APIRouter(prefix="/v1/fabric", tags=["sites"], dependencies=[Depends(NeedsInstance())])

ArtifactId = Annotated[str, Query(pattern=r"^art_[0-9a-f]{32}$")]
RunId = Annotated[str, Query(min_length=1, max_length=64)]
PartId = Annotated[str, Query(min_length=1, max_length=128)]


def artifacts_of(request: Request) -> Artifacts:
    """Return the hub's artifacts.

    Raises:
        NotFound: This hub keeps none.
    """
    if (artifacts := hub_of(request).artifacts) is None:
        raise NotFound(kind="route", name=f"{request.method} {request.url.path}")
    return artifacts


def limits_of(artifacts: Artifacts) -> dict[str, int]:
    """Return the paths whose bodies may be larger than others, and how large."""
    return {ARTIFACTS_PATH: MAX_CONSTS_BYTES, INSTANCE_PATH: artifacts.settings.file_bytes}


# ---- users ---------------------------------------------------------------------------------------


@router.put("/artifacts")
async def upload(request: Request) -> Json:
    """Keep a safetensors file: the body. Its id is good in ``consts.handle`` of a program."""
    artifacts, project = artifacts_of(request), caller_of(request).project
    record = await artifacts.keep(project, _body(request), limit_bytes=MAX_CONSTS_BYTES)
    try:
        data = await artifacts.read(record.id, project=project)
        await asyncio.to_thread(read_header, data)
    except ProgramError:
        await artifacts.delete(record.id, project=project)
        raise
    return _to_json(record)


@router.get("/artifacts/{artifact}")
async def download(request: Request, artifact: str) -> FileResponse:
    """Return an artifact's contents."""
    artifacts = artifacts_of(request)
    return _file(artifacts, await artifacts.get(artifact, project=caller_of(request).project))


@router.delete("/artifacts/{artifact}")
async def delete(request: Request, artifact: str) -> Json:
    """Forget an artifact before it expires."""
    await artifacts_of(request).delete(artifact, project=caller_of(request).project)
    return {"id": artifact, "object": "artifact", "deleted": True}


# ---- instances -----------------------------------------------------------------------------------


@instances.get("/instance/artifacts")
async def fetch(request: Request, artifact: ArtifactId, run: RunId) -> FileResponse:
    """Return the constants of a run that is at the instance."""
    artifacts = artifacts_of(request)
    project, _ = await _payer(request, run)
    return _file(artifacts, await artifacts.get(artifact, project=project))


@instances.put("/instance/artifacts")
async def leave(request: Request, artifact: ArtifactId, run: RunId, part: PartId) -> Json:
    """Keep what a run that is at the instance has saved: no more than it was admitted with."""
    artifacts = artifacts_of(request)
    project, limit_bytes = await _payer(request, run)
    record = await artifacts.keep(
        project,
        _body(request),
        artifact_id=artifact,
        run=run,
        part=part,
        limit_bytes=limit_bytes,
    )
    return _to_json(record)


async def _payer(request: Request, run: str) -> tuple[str, int]:
    """Return whose a program is and the most it may save.

    Raises:
        NotFound: It is not at the instance.
    """
    hub, instance = hub_of(request), launch_of(request).instance
    if (found := hub.broker.programs.payer(run, instance)) is not None:
        return found
    redeemed = await hub.offload(hub.catalog.redemption, run)
    if redeemed is None or redeemed.instance != instance or redeemed.due_at <= utc_now():
        raise NotFound(kind="run", name=run)
    return redeemed.project, redeemed.max_hook_bytes_out


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise RequestCancelled from None


def _file(artifacts: Artifacts, record: ArtifactRecord) -> FileResponse:
    path = artifacts.path(record)
    if not path.exists():
        raise NotFound(kind="artifact", name=record.id)
    return FileResponse(path, media_type="application/octet-stream")


def _to_json(record: ArtifactRecord) -> Json:
    return {
        "id": record.id,
        "object": "artifact",
        "size": record.num_bytes,
        "sha256": record.sha256,
        "expires_at": record.expires_at.isoformat(),
        "handle": {"artifact": record.id},
    }
