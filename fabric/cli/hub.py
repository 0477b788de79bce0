"""The hub's process: rooms over one database, served by uvicorn."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import click
import uvicorn
from fastapi import FastAPI

from fabric.auth import GlobusTokens, Groups, Keys, Users
from fabric.broker import BrokerSettings
from fabric.cli.options import output_options
from fabric.cli.output import Output
from fabric.config import (
    HubSettings,
    Settings,
    StateDir,
    globus_scope_of,
    load_settings,
    load_store,
)
from fabric.errors import PortInUse, SettingInvalid
from fabric.gateway import GatewaySettings, Outreach, get_server_config, open_app
from fabric.payloads import PayloadStore
from fabric.sql import Database, migrate

GC_THRESHOLD = 10_000
"""Objects more than there were at which the young ones are looked through; takes a millisecond."""

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_hub(settings: Settings) -> AsyncIterator[FastAPI]:
    """Open the database, bring its schema up to date, start the broker, and give the application.

    Raises:
        SettingInvalid: The database cannot be opened, the Globus credentials are half given, or
            the hub would be reachable from outside before anyone can prove who they are.
    """
    hub = settings.hub
    with Database(settings.get_database_url()) as database:
        migrate(database)
        tokens = get_globus_tokens(hub, database)
        if tokens is None:
            _refuse_open_door(hub, Keys(database))
        async with open_app(
            database,
            settings.state_dir,
            tokens=tokens,
            outreach=get_outreach(settings),
            broker_settings=get_broker_settings(hub),
            gateway_settings=GatewaySettings(
                body_limit_bytes=hub.body_limit_bytes, heartbeat_s=hub.heartbeat_s
            ),
        ) as app:
            yield app


def get_globus_tokens(hub: HubSettings, database: Database) -> GlobusTokens | None:
    """Return what takes Globus logins, if the hub is registered with Globus Auth.

    Raises:
        SettingInvalid: The id comes without its secret, or the secret without its id.
    """
    client_id, secret = hub.globus_client_id, hub.globus_client_secret
    if not client_id and not secret:
        return None
    if not client_id or not secret:
        missing = "globus_client_secret" if client_id else "globus_client_id"
        raise SettingInvalid(
            setting=f"hub.{missing}",
            value=None,
            reason="to take Globus logins the hub needs both its client id and the client's secret",
        )
    scope = hub.globus_scope or globus_scope_of(client_id)
    return GlobusTokens(
        Groups(database), Users(database), client_id=client_id, client_secret=secret, scope=scope
    )


def get_outreach(settings: Settings) -> Outreach:
    """Return what reaches instances that cannot dial, with the store of large results if any.

    Raises:
        SettingInvalid: The state directory's ``store.json`` cannot be read.
    """
    store = load_store(settings.state_dir)
    return Outreach(stores=() if store is None else (PayloadStore(store),))


def get_broker_settings(hub: HubSettings) -> BrokerSettings:
    """Return the broker's settings for a hub's."""
    return BrokerSettings(
        lease_s=hub.lease_s,
        first_token_timeout_s=hub.first_token_timeout_s,
        patience_s=hub.patience_s,
        project_weights=hub.project_weights,
    )


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is under way and return.

    Raises:
        PortInUse: Another process listens on the port.
        SettingInvalid: See ``open_hub``.
    """
    listener = listen(settings.hub.host, settings.hub.port)

    async def run() -> None:
        async with open_hub(settings) as app:
            config = get_server_config(app, host=settings.hub.host, port=settings.hub.port)
            _steady()
            host, port = listener.getsockname()[:2]
            logger.info("The hub serves at http://%s:%d.", host, port)
            await uvicorn.Server(config).serve(sockets=[listener])

    with listener, asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(run())


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, bound before anything else is started.

    Raises:
        PortInUse: Another process listens there.
        SettingInvalid: The host is not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except socket.gaierror as error:
        raise SettingInvalid(setting="hub.host", value=host, reason=str(error)) from error
    except OSError as error:
        raise PortInUse(host=host, port=port) from error
    listener.listen(1024)
    return listener


def _steady() -> None:
    """Keep rare long pauses out of the hub's latency.

    What was loaded by now lives as long as the process: left out of garbage collection, a full
    one takes under a millisecond instead of fifty. Requests leave few cycles behind, so that it is
    looked for them seldom.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def _refuse_open_door(hub: HubSettings, keys: Keys) -> None:
    try:
        inside = hub.host == "localhost" or ipaddress.ip_address(hub.host).is_loopback
    except ValueError:
        inside = False
    if not inside and not keys.keys():
        raise SettingInvalid(
            setting="hub.host",
            value=hub.host,
            reason="the hub would be reachable from other machines and has no key yet; make one"
            " with `fabric-admin key add`, or serve on 127.0.0.1",
        )


@click.command()
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where the hub keeps its files.")
@click.option("--database", "database_url", metavar="URL", help="The hub's database.")
@click.option("--host", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 takes a free one.")
@output_options
def hub(
    state_dir: Path | None,
    database_url: str | None,
    host: str | None,
    port: int | None,
    output: Output,  # noqa: ARG001 - every command takes --format and -v
) -> None:
    """Serve a hub in the foreground, until Ctrl-C or SIGTERM.

    \b
    Example:
      fabric-admin hub --host 127.0.0.1 --port 8642
    """
    settings = load_settings(
        {
            "state_dir": state_dir,
            "hub.database_url": database_url,
            "hub.host": host,
            "hub.port": port,
        }
    )
    StateDir(settings.state_dir).create()
    serve(settings)
