"""``/v1/fabric/instances``: instances that users bring, in jobs their own allocations pay."""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import AwareDatetime, Field

from fabric.auth import Decision, Identity
from fabric.broker.accounts import Account
from fabric.catalog import LaunchRecord, OwnSite
from fabric.errors import Duplicate, NotFound, NotGranted, RequestInvalid
from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.fabric_routes import Listing
from fabric.gateway.hub import Hub, caller_of, hub_of
from fabric.gateway.joining import expect
from fabric.ledger import JobCharge
from fabric.messages import Launch
from fabric.messages.request import ModelRef, SiteName
from fabric.messages.wire import Wire

MAX_LIFETIME_S = 60 * 86_400
"""The longest that a launch token is good for: weeks in a queue, then a job of days."""
MAX_UNITS = 1e12
"""The most that an account may have, in any unit."""

router = APIRouter(
    prefix="/v1/fabric/instances", tags=["instances"], dependencies=[Depends(Needs("launch"))]
)


class InstanceBody(Wire):
    """``POST /v1/fabric/instances``: one instance on a machine, and who may use it.

    Without ``overflow``, requests of those whose it is go nowhere else while it is there. One that
    is shared with all keeps nobody's.
    """

    model: ModelRef
    machine: SiteName
    sharing: Literal["private", "project", "shared"] = "project"
    overflow: bool | None = None
    lifetime_s: float = Field(default=7 * 86_400.0, gt=0, le=MAX_LIFETIME_S)


class OutlookBody(Wire):
    """``POST /v1/fabric/instances/{instance}/outlook``: when it should have joined."""

    ready_in_s: float = Field(ge=0, le=MAX_LIFETIME_S)


class JobBody(Wire):
    """``POST /v1/fabric/instances/{instance}/job``: what an instance's job took, once it is over.

    ``charge`` is in ``unit``, the machine's own.
    """

    launch: str = Field(pattern=r"^l-[0-9a-f]{8}$")
    job_id: str = Field(min_length=1, max_length=100, pattern=r"^[\w.@\[\]+-]+$")
    account: str | None = Field(default=None, max_length=64)
    num_nodes: int = Field(ge=1, le=1_000_000)
    elapsed_s: float = Field(ge=0, le=MAX_LIFETIME_S, allow_inf_nan=False)
    charge: Decimal = Field(ge=0, le=10**9, allow_inf_nan=False)
    unit: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
    source: Literal["sacct", "scontrol", "qstat", "launcher"]
    ended_at: AwareDatetime


class BalanceBody(Wire):
    """``POST /v1/fabric/instances/{instance}/balance``: what is left of the account that pays.

    ``available`` and ``needed``, what jobs that were asked for may still take, are in ``unit``.
    """

    account: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    unit: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
    available: float = Field(ge=-MAX_UNITS, le=MAX_UNITS, allow_inf_nan=False)
    needed: float | None = Field(default=None, ge=0, le=MAX_UNITS, allow_inf_nan=False)


class EndBody(Wire):
    """``POST /v1/fabric/instances/{instance}/end``."""

    reason: str = Field(max_length=1000)
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnInstance:
    """An instance of the caller's own, and how busy it is while it is connected."""

    instance: str
    machine: str
    site: str
    model: str
    sharing: str
    overflow: bool
    state: str
    connected: bool
    num_running: int
    num_waiting: int
    created_at: datetime


@router.post("", openapi_extra=documented(InstanceBody))
async def add_instance(request: Request) -> Launch:
    """Permit one instance to be started in a job of the caller's, and to join as theirs.

    What it serves costs nothing here: the machine charges its owner.
    """
    body = await read_body(request, InstanceBody)
    hub, caller = hub_of(request), caller_of(request)
    if body.sharing == "shared" and body.overflow is False:
        reason = "an instance for all keeps nobody's requests; leave it out, or share it with less"
        raise RequestInvalid(param="overflow", value=body.overflow, reason=reason)
    await _check_model(hub, caller, body.model)
    return await hub.offload(_add, hub, caller, body)


@router.get("")
async def list_instances(request: Request) -> Listing[OwnInstance]:
    """Return the instances that the caller's project has brought, newest first."""
    hub, caller = hub_of(request), caller_of(request)
    launches = await hub.offload(_own_launches, hub, caller)
    views = {view.instance: view for view in hub.broker.replicas()}
    data = []
    for launch, own in launches:
        view = views.get(launch.instance)
        data.append(
            OwnInstance(
                instance=launch.instance,
                machine=own.machine,
                site=launch.site,
                model=launch.model,
                sharing=own.sharing,
                overflow=not own.keeps,
                state=launch.state if view is None else view.state,
                connected=view is not None,
                num_running=0 if view is None else view.load.num_running,
                num_waiting=0 if view is None else view.load.num_waiting,
                created_at=launch.created_at,
            )
        )
    return Listing(data=data)


@router.post("/{instance}/outlook", openapi_extra=documented(OutlookBody))
async def tell_outlook(request: Request, instance: str) -> LaunchRecord:
    """Say when an instance of the caller's should have joined: requests may wait for it.

    What is not said again within a minute is forgotten.
    """
    body = await read_body(request, OutlookBody)
    hub, caller = hub_of(request), caller_of(request)
    launch = await hub.offload(_find, hub, caller, instance)
    expect(hub, launch, body.ready_in_s)
    return launch


@router.post("/{instance}/drain")
async def drain_instance(request: Request, instance: str) -> LaunchRecord:
    """Ask an instance of the caller's to finish what it has and leave."""
    hub, caller = hub_of(request), caller_of(request)
    launch = await hub.offload(_find, hub, caller, instance)
    channel = hub.channels.get(instance)
    if channel is None:
        raise NotFound(kind="connected instance", name=instance)
    await channel.drain("its owner asked it to leave")
    return launch


@router.post("/{instance}/job", openapi_extra=documented(JobBody))
async def report_job(request: Request, instance: str) -> JobCharge:
    """Note in the project's statement what the machine charges for an instance's job.

    It is a memo, which moves no balance. The first report of a job counts.
    """
    body = await read_body(request, JobBody)
    hub, caller = hub_of(request), caller_of(request)
    launch = await hub.offload(_find, hub, caller, instance)
    charge = JobCharge(
        project=caller.project,
        site=launch.site,
        instance=instance,
        model=launch.model,
        **body.model_dump(),
    )
    return await hub.offload(hub.ledger.note_job, charge)


@router.post("/{instance}/balance", openapi_extra=documented(BalanceBody))
async def report_balance(request: Request, instance: str) -> LaunchRecord:
    """Note what the account has left that pays for an instance of the caller's.

    It counts for choices among instances at its site alone, and is forgotten after an hour.
    """
    body = await read_body(request, BalanceBody)
    hub, caller = hub_of(request), caller_of(request)
    launch = await hub.offload(_find, hub, caller, instance)
    account = Account(
        name=body.account,
        unit=body.unit,
        available=body.available,
        needed=body.needed,
        asked_at=time.monotonic(),
    )
    hub.broker.arrivals.accounts.tell(launch.site, account)
    return launch


@router.post("/{instance}/end", openapi_extra=documented(EndBody))
async def end_instance(request: Request, instance: str) -> LaunchRecord:
    """Void the token of an instance of the caller's and end its session."""
    body = await read_body(request, EndBody)
    hub, caller = hub_of(request), caller_of(request)
    await hub.offload(_find, hub, caller, instance)
    launch = await hub.offload(hub.catalog.end_launch, instance, body.reason, failed=body.failed)
    hub.broker.arrivals.give_up(instance)
    if (channel := hub.channels.get(instance)) is not None:
        await channel.close("its launch was ended")
    return launch


async def _check_model(hub: Hub, caller: Identity, model: str) -> None:
    """Refuse a private model that the caller may not bring instances of.

    Raises:
        UnknownModel: The caller sees none of this name.
        NotGranted: The caller's grants are for other modes.
    """
    permits = await hub.permits(caller)
    version = await hub.offload(hub.catalog.seen_by(permits).resolve, model)
    if permits.decide(model=version.name, modes=("launch",)) is not Decision.ALLOWED:
        raise NotGranted(project=caller.project, model=version.name, modes=("launch",))


def _add(hub: Hub, caller: Identity, body: InstanceBody) -> Launch:
    own = OwnSite(
        machine=body.machine,
        project=caller.project,
        key_id=caller.key_id,
        sharing=body.sharing,
        overflow=bool(body.overflow),
    )
    site = _site_name(own)
    with suppress(Duplicate):
        display = f"{body.machine}, brought by {caller.project}"
        hub.catalog.add_site(site, display=display, facts={"owner": own.model_dump()})
        hub.ledger.set_rate("*", site, prompt_usu=0, cached_prompt_usu=0, output_usu=0)
        hub.ledger.open_allocation(caller.project, site)
    launch, token = hub.catalog.add_launch(site, body.model, lifetime_s=body.lifetime_s)
    version = hub.catalog.resolve(launch.model)
    return Launch(
        instance=launch.instance,
        site=launch.site,
        model=launch.model,
        source=version.source,
        digest=launch.digest,
        token=token,
    )


def _site_name(own: OwnSite) -> str:
    """Return the name of a machine as one project's, or one key's, place to run."""
    words = [own.machine, re.sub(r"[^a-z0-9]+", "-", own.project.lower()).strip("-")]
    # What the readable part leaves out: other projects may be spelt alike.
    told = f"{own.project}/{own.sharing}/{own.key_id if own.sharing == 'private' else ''}"
    told += "/overflow" if own.overflow else ""
    words.append(hashlib.sha256(told.encode()).hexdigest()[:8])
    return "-".join(filter(None, (words[0][:30], words[1][:20], words[2])))


def _own_launches(hub: Hub, caller: Identity) -> list[tuple[LaunchRecord, OwnSite]]:
    found = []
    for site in hub.catalog.sites():
        own = site.own
        if own is not None and own.belongs_to(caller.project, caller.key_id):
            found += [(launch, own) for launch in hub.catalog.launches(site=site.name)]
    return sorted(found, key=lambda pair: pair[0].created_at, reverse=True)


def _find(hub: Hub, caller: Identity, instance: str) -> LaunchRecord:
    """Return a launch of the caller's.

    Raises:
        NotFound: There is none of this name, or it is somebody else's.
    """
    launch = hub.catalog.launch(instance)
    own = hub.catalog.get_site(launch.site).own
    if own is None or not own.belongs_to(caller.project, caller.key_id):
        raise NotFound(kind="instance", name=instance)
    return launch
