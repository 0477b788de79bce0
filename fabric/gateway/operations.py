"""What those who run a hub look at: its health, its metrics, its schema."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from fabric import __version__
from fabric.errors import FabricError
from fabric.gateway.access import LocalOrNeeds, Public
from fabric.gateway.bodies import with_parts
from fabric.gateway.hub import hub_of
from fabric.messages import InstanceState
from fabric.messages.session import PROTOCOL

router = APIRouter(tags=["operations"])


@router.get("/healthz", dependencies=[Depends(Public())])
async def read_health(request: Request) -> Response:
    """Say whether the hub works: 200, or 503 if its database does not answer.

    The release and the protocol tell a site whether its instances would be understood.
    """
    hub = hub_of(request)
    num_ready = sum(view.state is InstanceState.READY for view in hub.broker.replicas())
    told = {"replicas": num_ready, "release": __version__, "protocol": PROTOCOL}
    try:
        await hub.offload(hub.catalog.sites)
    except FabricError as error:
        failing = {"status": "failing", "database": error.code}
        return JSONResponse(told | failing, status_code=503)
    return JSONResponse(told | {"status": "ok", "database": "ok"})


@router.get("/metrics", dependencies=[Depends(LocalOrNeeds("admin"))])
async def read_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(hub_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", dependencies=[Depends(Public())], include_in_schema=False)
async def read_schema(request: Request) -> Response:
    """Return the OpenAPI schema of these routes."""
    return JSONResponse(with_parts(request.app.openapi()))
