"""What the routes of one hub stand on; reached through the app, so that there are no globals."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.requests import HTTPConnection

from fabric.artifacts import Artifacts
from fabric.auth import Authenticator, Identity, Keys, Permits
from fabric.broker import Broker
from fabric.catalog import Catalog, CatalogView, LaunchRecord
from fabric.dispatch.protocol import Channel
from fabric.gateway.metrics import Metrics
from fabric.ledger import Ledger
from fabric.messages import InstanceState
from fabric.messages.weights import WeightsOffer
from fabric.sql import Offload

if TYPE_CHECKING:
    from fabric.gateway.outreach import Outreach


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """How the gateway behaves.

    Args:
        body_limit_bytes: The largest body it reads; a larger one is answered 413.
        heartbeat_s: How often instances are told to send heartbeats; three missed ones end a
            session.
        recheck_s: How often it is looked up whether another process ended a replica's launch.
    """

    body_limit_bytes: int = 8 * 2**20
    heartbeat_s: float = 2.0
    recheck_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What a site's agent last said of a launch in progress."""

    state: InstanceState
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """The rooms behind the routes, and what is only known in memory: reports and open channels."""

    broker: Broker
    catalog: Catalog
    keys: Keys
    authenticator: Authenticator
    ledger: Ledger
    offload: Offload
    metrics: Metrics
    settings: GatewaySettings
    outreach: Outreach
    artifacts: Artifacts | None = None
    reports: dict[str, SiteReport] = field(default_factory=dict)
    checks: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """One program is checked at a time: that takes a core, and the loop needs its share."""
    channels: dict[str, Channel] = field(default_factory=dict)
    weights: dict[str, tuple[WeightsOffer, float]] = field(default_factory=dict)
    """What jobs offer each other, by instance, and when it was last said (monotonic)."""

    async def permits(self, caller: Identity) -> Permits:
        """Return what a caller may do now."""
        return await self.broker.rules.permits(caller)

    async def seen_by(self, caller: Identity) -> CatalogView:
        """Return the catalog as a caller sees it: what is hidden from the caller is not there."""
        return self.catalog.seen_by(await self.permits(caller))


def hub_of(connection: HTTPConnection) -> Hub:
    """Return the hub that serves a connection."""
    return cast(Hub, connection.app.state.hub)


def caller_of(connection: HTTPConnection) -> Identity:
    """Return who called; there is a caller on every route with ``Needs``."""
    return cast(Identity, connection.state.caller)


def launch_of(connection: HTTPConnection) -> LaunchRecord:
    """Return the launch of the instance that called; it is there on every route of instances."""
    return cast(LaunchRecord, connection.state.launch)
