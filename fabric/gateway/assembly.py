"""A hub put together: its rooms over one database, and the application before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from fabric.adapters import Adapters
from fabric.artifacts import Artifacts, ArtifactSettings
from fabric.auth import Authenticator, GlobusTokens, Keys, Rulebook
from fabric.batches import Batches, BatchSettings
from fabric.broker import Broker, BrokerSettings
from fabric.catalog import Catalog
from fabric.gateway.app import create_app
from fabric.gateway.batch_lines import LineAnswerer
from fabric.gateway.hub import GatewaySettings
from fabric.gateway.metrics import Metrics
from fabric.gateway.outreach import Outreach
from fabric.ledger import Ledger
from fabric.sql import Database, Offload


@asynccontextmanager
async def open_app(
    database: Database,
    directory: Path,
    *,
    tokens: GlobusTokens | None = None,
    outreach: Outreach | None = None,
    broker_settings: BrokerSettings = BrokerSettings(),  # noqa: B008
    gateway_settings: GatewaySettings = GatewaySettings(),  # noqa: B008
    batch_settings: BatchSettings = BatchSettings(),  # noqa: B008
    artifact_settings: ArtifactSettings = ArtifactSettings(),  # noqa: B008
) -> AsyncIterator[FastAPI]:
    """Start a hub's rooms and give its application; they end with the block.

    Args:
        database: Open, and of the newest schema.
        directory: Where the files of batches, adapters and artifacts are kept.
        tokens: Takes Globus logins; without it there are API keys alone.
        outreach: Reaches instances that cannot dial; one without stores if not given.
        broker_settings: Limits and weights.
        gateway_settings: Caps and intervals.
        batch_settings: How batches are worked through.
        artifact_settings: How much is kept, and for how long.
    """
    keys, catalog, ledger = Keys(database), Catalog(database), Ledger(database)
    adapters = Adapters(database, directory / "adapters")
    adapters.prepare()
    outreach, metrics = outreach or Outreach(), Metrics()
    async with AsyncExitStack() as ending:
        offload = Offload(database)
        ending.callback(offload.close)
        rules = Rulebook(offload)
        authenticator = Authenticator(keys, offload, tokens, rules=rules)
        ending.callback(authenticator.close)
        broker = Broker(
            ledger=ledger,
            catalog=catalog,
            offload=offload,
            settings=broker_settings,
            observer=metrics,
            find_adapter=adapters.find,
            rules=rules,
        )
        ending.push_async_callback(broker.close)
        ending.push_async_callback(outreach.close)
        artifacts = Artifacts(
            database=database,
            offload=offload,
            directory=directory / "artifacts",
            settings=artifact_settings,
        )
        ending.push_async_callback(artifacts.close)
        batches = Batches(
            database=database,
            offload=offload,
            keys=keys,
            answerer=LineAnswerer(broker=broker, catalog=catalog, offload=offload, metrics=metrics),
            directory=directory / "files",
            settings=batch_settings,
        )
        ending.push_async_callback(batches.close)
        await broker.start()
        await batches.start()
        await artifacts.start()
        await ending.enter_async_context(offload.checkpointing())
        yield create_app(
            broker=broker,
            catalog=catalog,
            keys=keys,
            ledger=ledger,
            offload=offload,
            metrics=metrics,
            authenticator=authenticator,
            outreach=outreach,
            batches=batches,
            adapters=adapters,
            artifacts=artifacts,
            settings=gateway_settings,
        )
