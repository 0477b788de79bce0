"""``/v1/fabric/programs`` and ``/v1/fabric/points``: reading and writing inside a forward pass."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.exchange import Exchange
from fabric.gateway.hub import caller_of, hub_of
from fabric.gateway.program_checks import Prepared, get_points, prepare
from fabric.gateway.program_models import ProgramBody
from fabric.gateway.program_replies import ProgramReply
from fabric.gateway.replies import Json
from fabric.messages import PointManifest
from fabric.programs import json_schema

router = APIRouter(
    prefix="/v1/fabric", tags=["programs"], dependencies=[Depends(Needs("program:read"))]
)
anyone = APIRouter(prefix="/v1/fabric", tags=["programs"], dependencies=[Depends(Needs(None))])


@router.post("/programs", openapi_extra=documented(ProgramBody), response_model=None)
async def run_program(request: Request) -> Response | Json:
    """Run a program, or say what it would take (``quote``)."""
    body = await read_body(request, ProgramBody)
    hub, caller = hub_of(request), caller_of(request)
    prepared = await prepare(hub, caller, body.to_request())
    if body.quote:
        return await _quote(request, prepared)
    exchange = await Exchange.begin(request, [prepared.request], bounds=prepared.bounds)
    reply = ProgramReply(exchange, prepared.bounds, caller.project, hub.artifacts)
    return await (reply.stream() if body.stream else reply.whole())


@anyone.get("/points")
async def read_points(request: Request, model: str) -> PointManifest:
    """Return where programs may read and write in a model (``name`` or ``name@revision``)."""
    return await get_points(hub_of(request), caller_of(request), model)


@anyone.get("/programs/schema")
async def read_schema() -> Json:
    """Return the JSON Schema of a program."""
    return json_schema()


async def _quote(http: Request, prepared: Prepared) -> Json:
    hub, caller, bounds = hub_of(http), caller_of(http), prepared.bounds
    version = await hub.offload((await hub.seen_by(caller)).resolve, prepared.request.model)
    charges_usu = await hub.broker.programs.quote(caller, prepared.request, bounds)
    return {
        "object": "program.quote",
        "model": version.ref,
        "digest": version.digest,
        "program": bounds.program,
        "num_flops": bounds.num_flops,
        "result_bytes": bounds.hook_bytes_out,
        "hook_bytes_in": bounds.hook_bytes_in,
        "num_prompt_tokens": bounds.prompt_tokens,
        "num_output_tokens": bounds.output_tokens,
        "scopes": sorted(bounds.scopes),
        "charge_usu_max": max(charges_usu.values()),
        "charges_usu_max": dict(charges_usu),
        "device_s_max": bounds.device_s,
    }
