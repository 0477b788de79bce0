"""``/v1/fabric``: what users ask about the fabric itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from pydantic import AfterValidator
from pydantic_core import from_json

from fabric.auth import Permits
from fabric.broker import ReplicaView
from fabric.catalog import ModelVersion, RunRecord, SiteRecord, UsageSum
from fabric.errors import RequestInvalid
from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.hub import Hub, SiteReport, caller_of, hub_of
from fabric.gateway.openai_models import ChatBody, CompletionBody
from fabric.gateway.program_checks import prepare
from fabric.gateway.program_models import ProgramBody
from fabric.ledger import Statement
from fabric.messages import InstanceState, Placement

ItemT = TypeVar("ItemT")
Limit = Annotated[int, Query(ge=1, le=1000)]
Since = Annotated[
    datetime | None,
    AfterValidator(lambda at: at.replace(tzinfo=UTC) if at and at.tzinfo is None else at),
]

router = APIRouter(prefix="/v1/fabric", tags=["fabric"], dependencies=[Depends(Needs("query"))])
anyone = APIRouter(prefix="/v1/fabric", tags=["fabric"], dependencies=[Depends(Needs(None))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing(Generic[ItemT]):
    """Several of a kind, in the form of OpenAI's lists."""

    data: Sequence[ItemT]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A caller as the hub knows it; ``user`` and ``projects`` are a Globus login's."""

    key: str
    project: str
    scopes: Sequence[str]
    site: str | None
    max_concurrent: int
    auth: Literal["api-key", "globus"]
    user: str | None
    projects: Sequence[str]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One running copy of a model."""

    instance: str
    site: str
    model: str
    digest: str
    state: InstanceState
    dtype: str
    context_tokens: int
    max_rows: int
    num_running: int
    num_waiting: int
    num_in_flight: int
    cache_usage: float
    joined_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One version of a model, and where it runs."""

    id: str
    name: str
    revision: str
    digest: str | None
    context_tokens: int
    dtype: str | None
    replicas: Sequence[Replica]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One site; ``detail`` is what its agent last said of a launch in progress, and when it is next
    in maintenance."""

    name: str
    display: str
    channel: str
    state: str
    detail: str
    replicas: Sequence[Replica]


@anyone.get("/whoami")
async def read_caller(request: Request) -> Caller:
    """Say who the hub takes the caller for."""
    caller = caller_of(request)
    return Caller(
        key=caller.key_id,
        project=caller.project,
        scopes=sorted(caller.scopes),
        site=caller.site,
        max_concurrent=caller.max_concurrent,
        auth="api-key" if caller.user is None else "globus",
        user=caller.user,
        projects=caller.projects or [caller.project],
        expires_at=caller.expires_at,
    )


@router.get("/sites")
async def list_sites(request: Request) -> Listing[Site]:
    """Return the sites with what runs there."""
    hub, caller = hub_of(request), caller_of(request)
    permits = await hub.permits(caller)
    sites = await hub.offload(hub.catalog.seen_by(permits).sites)
    return Listing(data=[_site(hub, site, permits) for site in sites])


@router.get("/models")
async def list_versions(request: Request) -> Listing[Model]:
    """Return all versions of the models that the caller may use, with their replicas."""
    hub, caller = hub_of(request), caller_of(request)
    seen = await hub.seen_by(caller)
    usable = {site.name for site in await hub.offload(seen.sites)}
    views = [view for view in hub.broker.replicas() if view.site in usable]
    return Listing(data=[_model(v, views) for v in await hub.offload(seen.models)])


@router.post("/explain", openapi_extra=documented(CompletionBody, ChatBody, ProgramBody))
async def explain(request: Request) -> Placement:
    """Say where a completion, chat completion or program would run now, and what every candidate
    costs."""
    hub, caller = hub_of(request), caller_of(request)
    fields = _fields(await request.body())
    if "program" in fields:
        body = (await read_body(request, ProgramBody)).to_request()
        prepared = await prepare(hub, caller, body)
        return await hub.broker.explain(caller, prepared.request, bounds=prepared.bounds)
    if "messages" in fields:
        asked = (await read_body(request, ChatBody)).to_request()
    else:
        completion = await read_body(request, CompletionBody)
        if (num := len(completion.prompt)) != 1:
            reason = "explain takes one prompt at a time"
            raise RequestInvalid(param="prompt", value=num, reason=reason)
        asked = next(completion.requests())
    return await hub.broker.explain(caller, asked)


@router.get("/usage")
async def read_usage(request: Request, since: Since = None, limit: Limit = 100) -> Statement:
    """Return the statement and the allocations of the caller's project."""
    hub, project = hub_of(request), caller_of(request).project
    return await hub.offload(hub.ledger.statement, project, since=since, limit=limit)


@router.get("/spend")
async def read_spend(request: Request, since: Since = None) -> Listing[UsageSum]:
    """Return what the runs of the caller's project add up to, by model and site."""
    hub, project = hub_of(request), caller_of(request).project
    # It reads every run of the time: not on the database's thread, where others would wait.
    return Listing(data=await asyncio.to_thread(hub.catalog.usage, project, since=since))


@router.get("/runs")
async def list_runs(request: Request, since: Since = None, limit: Limit = 20) -> Listing[RunRecord]:
    """Return the latest runs of the caller's project, newest first."""
    hub, project = hub_of(request), caller_of(request).project
    return Listing(data=await hub.offload(hub.catalog.runs, project, since=since, limit=limit))


@router.get("/runs/{run}")
async def read_run(request: Request, run: str) -> RunRecord:
    """Return one run of the caller's project."""
    hub, project = hub_of(request), caller_of(request).project
    return await hub.offload(hub.catalog.run, run, project=project)


def _fields(data: bytes) -> Collection[str]:
    try:
        body = from_json(data)
    except ValueError:
        return ()
    return body.keys() if isinstance(body, dict) else ()


def _replicas(views: Iterable[ReplicaView]) -> list[Replica]:
    return [
        Replica(
            instance=view.instance,
            site=view.site,
            model=view.model,
            digest=view.digest,
            state=view.state,
            dtype=view.dtype,
            context_tokens=view.limits.context_tokens,
            max_rows=view.limits.max_rows,
            num_running=view.load.num_running,
            num_waiting=view.load.num_waiting,
            num_in_flight=view.num_in_flight,
            cache_usage=view.load.cache_usage,
            joined_at=datetime.fromtimestamp(view.joined_at, UTC),
        )
        for view in views
    ]


def _model(version: ModelVersion, views: Iterable[ReplicaView]) -> Model:
    return Model(
        id=version.ref,
        name=version.name,
        revision=version.revision,
        digest=version.digest,
        context_tokens=version.context_tokens,
        dtype=version.dtype,
        replicas=_replicas(view for view in views if view.digest == version.digest),
    )


def _site(hub: Hub, site: SiteRecord, permits: Permits) -> Site:
    here = [view for view in hub.broker.replicas() if view.site == site.name]
    report = hub.reports.get(site.name)
    return Site(
        name=site.name,
        display=site.display,
        channel=site.channel,
        state=_site_state(site, report, {view.state for view in here}),
        detail="; ".join(filter(None, _details(hub, site, permits))),
        replicas=_replicas(
            view for view in here if permits.sees_model(view.model.partition("@")[0])
        ),
    )


def _details(hub: Hub, site: SiteRecord, permits: Permits) -> Iterator[str]:
    if (report := hub.reports.get(site.name)) is not None:
        yield report.detail
    yield _closing(site)
    # What an account has left is told to those alone whose it is.
    if site.own is not None and site.own.belongs_to(permits.project, permits.key_id):
        now = time.monotonic()
        for one in hub.broker.arrivals.accounts.of(site.name, now):
            left, minutes = f"{one.available:,.6g} {one.unit}", (now - one.asked_at) / 60
            short = "; too little for what was asked for" if one.shortfall else ""
            yield f"account {one.name}: {left} left, asked {minutes:.0f} min ago{short}"


def _closing(site: SiteRecord) -> str:
    """Return when a site is next in maintenance, in words."""
    now = datetime.now(UTC)
    coming = (one for one in site.rules.maintenance if one.ends_at > now)
    if (one := next(coming, None)) is None:
        return ""
    times = f"{one.starts_at.astimezone(UTC):%Y-%m-%d %H:%M} to {one.ends_at:%Y-%m-%d %H:%M} UTC"
    return f"maintenance {times}" + (f" ({one.reason})" if one.reason else "")


def _site_state(
    site: SiteRecord, report: SiteReport | None, replicas: Collection[InstanceState]
) -> str:
    if site.state == "disabled":
        return site.state
    if InstanceState.READY in replicas:
        return InstanceState.READY
    if report is None:
        return min(replicas, default=InstanceState.PENDING)
    # An agent that died cannot say so; what it last said of a ready instance is then not true.
    return InstanceState.LOST if report.state == InstanceState.READY else report.state
