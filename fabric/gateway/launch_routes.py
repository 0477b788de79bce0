"""``/v1/fabric``: what site agents tell the hub, each about its own site only."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from fabric.auth import Identity, Rules, require_site
from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.hub import SiteReport, caller_of, hub_of
from fabric.gateway.joining import expect
from fabric.messages import InstanceState, Launch
from fabric.messages.request import ModelRef, SiteName
from fabric.messages.wire import Wire

MAX_START_S = 30 * 86_400.0
"""A queue of weeks, and a load."""

router = APIRouter(prefix="/v1/fabric", tags=["sites"], dependencies=[Depends(Needs("site"))])


class LaunchBody(Wire):
    """``POST /v1/fabric/launches``."""

    site: SiteName
    model: ModelRef


class EndBody(Wire):
    """``POST /v1/fabric/launches/{instance}/end``."""

    reason: str = Field(max_length=1000)
    failed: bool = False


class OutlookBody(Wire):
    """``POST /v1/fabric/launches/{instance}/outlook``."""

    ready_in_s: float = Field(ge=0, le=MAX_START_S)


class StatusBody(Wire):
    """``POST /v1/fabric/sites/{site}/status``."""

    state: InstanceState
    detail: str = Field(default="", max_length=1000)


@dataclass(frozen=True, slots=True)
class Agent:
    """A site's agent as a ``fabric.catalog.Viewer``: what may run at its site is there for it."""

    caller: Identity
    rules: Rules
    site: str

    @property
    def project(self) -> str:
        """Whose key it has."""
        return self.caller.project

    @property
    def key_id(self) -> str:
        """Its key."""
        return self.caller.key_id

    def sees_model(self, model: str) -> bool:
        """Return whether the site may run a model."""
        return self.rules.serves(model, self.site)

    def sees_site(self, site: str) -> bool:
        """Return whether it is its own."""
        return site == self.site


@router.post("/launches", openapi_extra=documented(LaunchBody))
async def add_launch(request: Request) -> Launch:
    """Permit one instance to be started at the caller's site: of a private model, if somebody may
    use it there."""
    body = await read_body(request, LaunchBody)
    require_site(caller_of(request), body.site)
    hub = hub_of(request)
    agent = Agent(caller_of(request), await hub.broker.rules.current(), body.site)
    version = await hub.offload(hub.catalog.seen_by(agent).resolve, body.model)
    launch, token = await hub.offload(hub.catalog.add_launch, body.site, version.ref)
    return Launch(
        instance=launch.instance,
        site=launch.site,
        model=launch.model,
        source=version.source,
        digest=launch.digest,
        token=token,
    )


@router.post("/launches/{instance}/end", status_code=204, openapi_extra=documented(EndBody))
async def end_launch(request: Request, instance: str) -> Response:
    """Void a launch's token and end its session."""
    body = await read_body(request, EndBody)
    hub, site = hub_of(request), caller_of(request).site
    await hub.offload(hub.catalog.end_launch, instance, body.reason, failed=body.failed, site=site)
    hub.broker.arrivals.give_up(instance)
    if (channel := hub.channels.get(instance)) is not None:
        await channel.close("its launch was ended")
    return Response(status_code=204)


@router.post("/launches/{instance}/outlook", status_code=204, openapi_extra=documented(OutlookBody))
async def tell_outlook(request: Request, instance: str) -> Response:
    """Say when an instance of the caller's site should have joined: requests may wait for it."""
    body = await read_body(request, OutlookBody)
    hub, site = hub_of(request), caller_of(request).site
    launch = await hub.offload(hub.catalog.launch, instance, site=site)
    expect(hub, launch, body.ready_in_s)
    return Response(status_code=204)


@router.post("/sites/{site}/status", status_code=204, openapi_extra=documented(StatusBody))
async def report_status(request: Request, site: str) -> Response:
    """Note how far a launch at the caller's site has come."""
    body = await read_body(request, StatusBody)
    require_site(caller_of(request), site)
    hub_of(request).reports[site] = SiteReport(state=body.state, detail=body.detail)
    return Response(status_code=204)
