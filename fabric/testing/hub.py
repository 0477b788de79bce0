"""A real hub in this process: database, broker, gateway on a socket, instances that dial in.

Only the model is not real (``FixedDelayEngine``). All of it runs on one event loop of its own.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import uvicorn
import uvloop
from websockets.asyncio.client import ClientConnection

from fabric.artifacts import Artifacts, ArtifactSettings
from fabric.auth import GlobusTokens, Grants, Keys
from fabric.batches import BatchSettings
from fabric.broker import Broker, BrokerSettings
from fabric.catalog import Catalog
from fabric.gateway import GatewaySettings, get_server_config, open_app
from fabric.gateway.hub import Hub
from fabric.instance.depot import Depot
from fabric.instance.dial import dial
from fabric.instance.serve import serve_session
from fabric.ledger import Ledger
from fabric.messages import Hello
from fabric.sql import Database, migrate
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.patience import PATIENCE_S

MODEL = "fixed"
PROJECT = "physics"
CALL_TIMEOUT_S = 20.0
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class RunningSite:
    """One site with one instance. The engine's pace may be changed while it runs."""

    name: str
    instance: str
    engine: FixedDelayEngine
    depot: Depot
    dialling: asyncio.Task[None] | None = None
    connection: ClientConnection | None = None

    async def kill(self) -> None:
        """End it as SIGKILL would: the connection is cut and nobody says goodbye."""
        assert self.dialling is not None
        if self.connection is not None:
            self.connection.transport.abort()
        self.dialling.cancel()
        with suppress(asyncio.CancelledError):
            await self.dialling
        await asyncio.to_thread(self.engine.close)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningHub:
    """A hub that serves at ``base_url``, with the rooms behind it and its sites.

    ``api_key`` may query and belongs to ``PROJECT``, which has an allocation for all sites.
    """

    base_url: str
    api_key: str
    keys: Keys
    grants: Grants
    catalog: Catalog
    ledger: Ledger
    broker: Broker
    loop: asyncio.AbstractEventLoop
    files_dir: Path
    artifacts: Artifacts
    sites: dict[str, RunningSite] = field(default_factory=dict)

    @property
    def openai_url(self) -> str:
        """What an OpenAI client takes as its base URL."""
        return f"{self.base_url}/v1"

    @property
    def session_url(self) -> str:
        """Where instances dial."""
        return f"ws{self.base_url.removeprefix('http')}/v1/fabric/session"

    def call(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run a coroutine on the hub's loop and return its result; called from other threads."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(CALL_TIMEOUT_S)

    def kill_site(self, name: str) -> None:
        """End a site's instance abruptly; called from other threads."""
        self.call(self.sites[name].kill())

    async def start_site(self, name: str, engine: FixedDelayEngine) -> RunningSite:
        """Launch an instance at a site and return it once it is a replica."""
        launch, token = self.catalog.add_launch(name, MODEL)
        engine.start()
        info = engine.info
        hello = Hello(
            instance=launch.instance,
            site=name,
            model=launch.model,
            digest=info.digest,
            limits=info.limits,
            dtype=info.dtype,
            engine=info.engine,
            points=info.points,
        )
        depot = Depot(self.session_url, token, instance=launch.instance)
        engine.keep = depot.keep
        site = self.sites[name] = RunningSite(
            name=name, instance=launch.instance, engine=engine, depot=depot
        )
        drain = asyncio.Event()

        async def serve(connection: ClientConnection) -> None:
            site.connection = connection
            await serve_session(connection, engine, hello, drain, depot=depot)

        site.dialling = asyncio.create_task(dial(self.session_url, token, serve, drain))
        await eventually(
            lambda: launch.instance in {view.instance for view in self.broker.replicas()}
        )
        return site


class HubOptions(TypedDict, total=False):
    """How a hub for tests is made.

    Attributes:
        sites: Their names; each gets one instance. ``alpha`` and ``beta`` by default.
        engine: Makes the engine of each.
        grant_usu: The project's allocation; a prompt token costs 1 micro-SU, an output token 2.
        broker: The broker's settings.
        gateway: The gateway's settings.
        batches: The settings of batches.
        artifacts: The settings of artifacts.
        tokens: Makes what takes Globus logins, over the hub's database; none by default.
        database_url: Its database; a SQLite file in the directory by default.
    """

    sites: Sequence[str]
    engine: Callable[[], FixedDelayEngine]
    grant_usu: int
    broker: BrokerSettings
    gateway: GatewaySettings
    batches: BatchSettings
    artifacts: ArtifactSettings
    tokens: Callable[[Database], GlobusTokens]
    database_url: str


@asynccontextmanager
async def serve_hub(directory: Path, **options: Unpack[HubOptions]) -> AsyncIterator[RunningHub]:
    """Yield a hub on this event loop, its sites ready.

    Args:
        directory: Where its database is made; a hub that was there before goes on.
        **options: See ``HubOptions``.
    """
    sites = options.get("sites", ("alpha", "beta"))
    get_engine = options.get("engine", FixedDelayEngine)
    url = options.get("database_url", f"sqlite:///{directory / 'hub.sqlite'}")
    with Database(url) as database:
        migrate(database)
        api_key = _seed(database, sites, options.get("grant_usu", 10**12))
        get_tokens = options.get("tokens")
        opening = open_app(
            database,
            directory,
            tokens=get_tokens(database) if get_tokens else None,
            broker_settings=options.get("broker", BrokerSettings()),
            gateway_settings=options.get("gateway", GatewaySettings()),
            batch_settings=options.get("batches", BatchSettings(poll_s=0.1)),
            artifact_settings=options.get("artifacts", ArtifactSettings()),
        )
        async with (
            opening as app,
            _serving(get_server_config(app, host="127.0.0.1", port=0)) as base_url,
        ):
            rooms: Hub = app.state.hub
            assert rooms.artifacts is not None
            hub = RunningHub(
                base_url=base_url,
                api_key=api_key,
                keys=rooms.keys,
                grants=Grants(database),
                catalog=rooms.catalog,
                ledger=rooms.ledger,
                broker=rooms.broker,
                loop=asyncio.get_running_loop(),
                files_dir=directory / "files",
                artifacts=rooms.artifacts,
            )
            try:
                for name in sites:
                    await hub.start_site(name, get_engine())
                yield hub
            finally:
                await app.state.batches.close()
                for site in hub.sites.values():
                    await site.kill()


@contextmanager
def running_hub(directory: Path, **options: Unpack[HubOptions]) -> Iterator[RunningHub]:
    """Yield a hub on a thread of its own; see ``serve_hub``."""
    context = serve_hub(directory, **options)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="hub")
    thread.start()
    try:
        hub = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result()
        try:
            yield hub
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = PATIENCE_S) -> None:
    """Return once ``condition`` holds.

    Raises:
        TimeoutError: It does not within ``timeout_s`` seconds.
    """
    asyncio.run(eventually(condition, timeout_s=timeout_s))


async def eventually(condition: Callable[[], bool], *, timeout_s: float = PATIENCE_S) -> None:
    """Return once ``condition`` holds; see ``wait_until``."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def _serving(config: uvicorn.Config) -> AsyncIterator[str]:
    """Serve and yield the address."""
    listener = socket.socket()
    listener.bind((config.host, config.port))
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await eventually(lambda: server.started or serving.done())
    try:
        yield f"http://{config.host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


def _seed(database: Database, sites: Sequence[str], grant_usu: int) -> str:
    """Fill an empty database and return a key of the project."""
    keys, catalog, ledger = Keys(database), Catalog(database), Ledger(database)
    is_empty = not keys.projects()
    if is_empty:
        keys.add_project(PROJECT)
    _, api_key = keys.add_key(PROJECT)
    if not is_empty:
        return api_key
    catalog.add_model(MODEL, "1", context_tokens=2048, source="fixed-delay:")
    for name in sites:
        catalog.add_site(name)
    ledger.set_rate("*", "*", prompt_usu=1, cached_prompt_usu=1, output_usu=2)
    ledger.grant(ledger.open_allocation(PROJECT, "*"), grant_usu)
    return api_key
