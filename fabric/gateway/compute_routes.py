"""``/v1/fabric``: registered functions, and instances that are reached through their endpoint."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.hub import caller_of, hub_of
from fabric.messages import Reach

router = APIRouter(prefix="/v1/fabric", tags=["sites"])


@router.get("/functions", dependencies=[Depends(Needs(None))])
async def list_functions(request: Request) -> dict[str, Any]:
    """Return the functions that are registered with Globus Compute, newest first."""
    hub = hub_of(request)
    records = await hub.offload(hub.catalog.functions)
    return {
        "data": [
            {
                "name": record.name,
                "id": str(record.id),
                "sha256": record.sha256,
                "visibility": record.visibility,
                "endpoint_id": record.endpoint_id and str(record.endpoint_id),
            }
            for record in records
        ]
    }


@router.post(
    "/launches/{instance}/reach",
    status_code=204,
    openapi_extra=documented(Reach),
    dependencies=[Depends(Needs("site"))],
)
async def reach(request: Request, instance: str) -> Response:
    """Open a compute channel to a ready instance of the caller's site, unless there is one."""
    body = await read_body(request, Reach)
    hub, site = hub_of(request), caller_of(request).site
    launch = await hub.offload(hub.catalog.launch, instance, site=site)
    hub.outreach.reach(hub, launch, body)
    return Response(status_code=204)
