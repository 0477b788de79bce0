"""``/v1/fabric/tickets``: what pays for raw calls at a site, for the caller's own project."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from fabric.auth import TicketRecord
from fabric.auth.tickets import DEFAULT_LIFETIME_S, MAX_LIFETIME_S, MAX_USU
from fabric.errors import DataStays
from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.fabric_routes import Listing
from fabric.gateway.hub import caller_of, hub_of
from fabric.messages.request import SiteName
from fabric.messages.wire import Wire

router = APIRouter(prefix="/v1/fabric", tags=["fabric"], dependencies=[Depends(Needs("query"))])


class TicketBody(Wire):
    """``POST /v1/fabric/tickets``."""

    site: SiteName
    ttl_s: float = Field(default=DEFAULT_LIFETIME_S, gt=0.0, le=MAX_LIFETIME_S)
    max_usu: int | None = Field(default=None, ge=1, le=MAX_USU)


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedTicket:
    """A new ticket; ``ticket`` itself is never shown again."""

    id: str
    ticket: str
    site: str
    project: str
    max_usu: int | None
    expires_at: datetime


@router.post("/tickets", openapi_extra=documented(TicketBody))
async def issue_ticket(request: Request) -> IssuedTicket:
    """Issue a ticket for raw calls at one site."""
    body = await read_body(request, TicketBody)
    hub, caller = hub_of(request), caller_of(request)
    permits = await hub.permits(caller)
    await hub.offload(hub.catalog.seen_by(permits).get_site, body.site)
    if permits.homes is not None and not permits.may_send_to(body.site):
        homes = sorted(filter(permits.sees_site, permits.homes))
        raise DataStays(project=caller.project, homes=homes, asked=[body.site])
    record, ticket = await hub.offload(
        hub.keys.tickets.add, caller, body.site, lifetime_s=body.ttl_s, max_usu=body.max_usu
    )
    return IssuedTicket(
        id=record.id,
        ticket=ticket,
        site=record.site,
        project=record.project,
        max_usu=record.max_usu,
        expires_at=record.expires_at,
    )


@router.get("/tickets")
async def list_tickets(request: Request) -> Listing[TicketRecord]:
    """Return the tickets of the caller's project that can still be used."""
    hub, project = hub_of(request), caller_of(request).project
    return Listing(data=await hub.offload(hub.keys.tickets.listed, project))


@router.delete("/tickets/{ticket}")
async def revoke_ticket(request: Request, ticket: str) -> TicketRecord:
    """Void a ticket of the caller's project."""
    hub, project = hub_of(request), caller_of(request).project
    return await hub.offload(hub.keys.tickets.revoke, ticket, project=project)
