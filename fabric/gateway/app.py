"""The hub's ASGI application."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from fabric import __version__
from fabric.adapters import Adapters
from fabric.artifacts import Artifacts
from fabric.auth import Authenticator, Keys
from fabric.batches import Batches
from fabric.broker import Broker
from fabric.catalog import Catalog
from fabric.errors import FabricError
from fabric.gateway import (
    adapter_routes,
    artifact_routes,
    batch_routes,
    chat,
    completions,
    compute_routes,
    embeddings,
    fabric_routes,
    launch_routes,
    model_routes,
    operations,
    own_instances,
    program_routes,
    refusals,
    session_route,
    ticket_routes,
    tier_routes,
    weights_routes,
)
from fabric.gateway.access import undeclared
from fabric.gateway.bodies import BodyLimit
from fabric.gateway.hub import GatewaySettings, Hub
from fabric.gateway.metrics import Metrics
from fabric.gateway.outreach import Outreach
from fabric.gateway.rate_headers import RateHeaders
from fabric.gateway.request_ids import RequestIds
from fabric.gateway.tier_metrics import Tiers
from fabric.ledger import Ledger
from fabric.sql import Offload

ROUTERS = (
    model_routes.router,
    completions.router,
    chat.router,
    embeddings.router,
    batch_routes.router,
    fabric_routes.router,
    fabric_routes.anyone,
    adapter_routes.router,
    adapter_routes.instances,
    program_routes.router,
    program_routes.anyone,
    artifact_routes.router,
    artifact_routes.instances,
    weights_routes.router,
    ticket_routes.router,
    tier_routes.router,
    launch_routes.router,
    own_instances.router,
    compute_routes.router,
    session_route.router,
    operations.router,
)


def create_app(
    *,
    broker: Broker,
    catalog: Catalog,
    keys: Keys,
    ledger: Ledger,
    offload: Offload,
    metrics: Metrics,
    authenticator: Authenticator | None = None,
    outreach: Outreach | None = None,
    batches: Batches | None = None,
    adapters: Adapters | None = None,
    artifacts: Artifacts | None = None,
    settings: GatewaySettings = GatewaySettings(),  # noqa: B008
) -> FastAPI:
    """Return the application. The caller starts and closes what it is given.

    Args:
        broker: Runs the requests; ``metrics`` is its observer.
        catalog: Sites, models, launches and runs.
        keys: API keys.
        ledger: What callers have.
        offload: Runs what asks the database.
        metrics: What ``/metrics`` shows.
        authenticator: Who calls; by API keys alone if not given.
        outreach: Reaches instances that cannot dial; one without stores if not given.
        batches: Files and batches; without them their routes answer 404.
        adapters: Adapters; without them their routes answer 404.
        artifacts: What programs are given and leave; without them programs have inline constants
            and results alone.
        settings: Caps and intervals.
    """
    app = FastAPI(
        title="Fabric",
        version=__version__,
        openapi_url=None,
        # Not included as routers: the routes, with what they declare, stay open to inspection.
        routes=[route for router in ROUTERS for route in router.routes],
        middleware=[
            Middleware(RequestIds),
            Middleware(RateHeaders),
            Middleware(
                BodyLimit,
                limit_bytes=settings.body_limit_bytes,
                at_path_bytes={
                    **({} if batches is None else batch_routes.limits_of(batches)),
                    **({} if adapters is None else adapter_routes.limits_of(adapters)),
                    **({} if artifacts is None else artifact_routes.limits_of(artifacts)),
                },
            ),
        ],
        exception_handlers={
            FabricError: refusals.on_fabric_error,
            RequestValidationError: refusals.on_invalid_query,
            HTTPException: refusals.on_http_exception,
            Exception: refusals.on_defect,
        },
    )
    if open_routes := undeclared(app.routes):
        raise RuntimeError(f"These routes do not declare what they need: {open_routes}")
    app.state.hub = Hub(
        broker=broker,
        catalog=catalog,
        keys=keys,
        authenticator=authenticator or Authenticator(keys, offload, rules=broker.rules),
        ledger=ledger,
        offload=offload,
        metrics=metrics,
        settings=settings,
        outreach=outreach or Outreach(),
        artifacts=artifacts,
    )
    app.state.batches = batches
    app.state.adapters = adapters
    metrics.watch_replicas(broker.replicas)
    metrics.registry.register(Tiers(broker.tiers.attained, broker.tiers.waiting))
    return app
