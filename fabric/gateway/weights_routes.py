"""``/v1/fabric/instance/weights``: jobs that give their version's files to others of their owners.

Who gives and where is only known in memory, and forgotten unless it is said again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fabric.catalog import OwnSite
from fabric.gateway.access import NeedsInstance
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.fabric_routes import Listing
from fabric.gateway.hub import Hub, hub_of, launch_of
from fabric.messages.weights import WeightsOffer, WeightsSource, make_ticket

OFFER_S = 60.0
"""An offer that is not repeated for so long is forgotten."""

TICKET_S = 2 * 3600.0
"""How long a ticket lets its launch fetch: a hundred gigabytes over a slow network."""

router = APIRouter(prefix="/v1/fabric", tags=["sites"], dependencies=[Depends(NeedsInstance())])


@router.put("/instance/weights", status_code=204, openapi_extra=documented(WeightsOffer))
async def offer(request: Request) -> Response:
    """Say that the caller's job gives its files to other jobs; to be repeated every while."""
    offered = await read_body(request, WeightsOffer)
    hub_of(request).weights[launch_of(request).instance] = (offered, time.monotonic())
    return Response(status_code=204)


@router.get("/instance/weights")
async def sources(request: Request) -> Listing[WeightsSource]:
    """Return who gives the files of the caller's version: replicas of its project on its machine.

    They serve now, so that the hub has held their digest against the version's.
    """
    hub, launch = hub_of(request), launch_of(request)
    offers = _find_offers(hub, launch.model)
    near = await hub.offload(_keep_near, hub, launch.site, {site for _, site, _ in offers})
    expires_at = time.time() + TICKET_S
    return Listing(
        data=[
            WeightsSource(
                instance=instance,
                url=one.url,
                ticket=make_ticket(one.key, launch.instance, expires_at),
            )
            for instance, site, one in offers
            if site in near and instance != launch.instance
        ]
    )


def _find_offers(hub: Hub, model: str) -> Sequence[tuple[str, str, WeightsOffer]]:
    """Return what connected instances of a version offer, with their sites."""
    oldest = time.monotonic() - OFFER_S
    for instance in [one for one, (_, at) in hub.weights.items() if at < oldest]:
        del hub.weights[instance]
    return [
        (instance, channel.hello.site, offered)
        for instance, (offered, _) in hub.weights.items()
        if (channel := hub.channels.get(instance)) is not None and channel.hello.model == model
    ]


def _keep_near(hub: Hub, site: str, others: set[str]) -> set[str]:
    """Return those sites whose instances may give to one at ``site``."""
    mine = hub.catalog.get_site(site).own
    return {name for name in others if name == site or _gives(hub.catalog.get_site(name).own, mine)}


def _gives(giver: OwnSite | None, taker: OwnSite | None) -> bool:
    if giver is None or taker is None or giver.sharing == "private":
        return False
    return (giver.machine, giver.project) == (taker.machine, taker.project)
