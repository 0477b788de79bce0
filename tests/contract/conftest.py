"""The channels under contract, each in front of the same engine."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fabric.compute import ServiceLimits
from fabric.dispatch.direct import open_direct
from fabric.dispatch.parsl import ParslRelay
from fabric.dispatch.protocol import Channel
from fabric.dispatch.relay import RelayChannel, RelayFigures
from fabric.launch.block import Block
from fabric.testing.channel import FakeChannel
from fabric.testing.compute import TASK_ENVIRON, ComputeSite, get_rig_pool
from fabric.testing.globus import PublishedLimits, running_globus
from fabric.testing.instance import get_fixed_delay_engine
from fabric.testing.patience import within
from fabric.testing.rig import get_spec, serve_hub_end, start_instance

HEARTBEAT_S = 0.1
NUM_RELAYS = 3
COMPUTE_LAG_S = 6.0
"""Two half-second polls on each way, a question under way already, and a busy machine."""
MANY_REQUESTS = 1000


@dataclass(frozen=True)
class Rig:
    """A channel, and how to end its instance as a power cut would.

    ``lag_s`` is how much later than at the instance itself things are seen on the channel.
    """

    channel: Channel
    kill: Callable[[], object]
    lag_s: float = 0.0


@dataclass(frozen=True)
class OpenRig:
    """Opens a rig of one kind; takes the engine's arguments as text."""

    opener: Callable[[str], AbstractAsyncContextManager[Rig]]
    lag_s: float = 0.0

    def __call__(self, engine: str = "") -> AbstractAsyncContextManager[Rig]:
        return self.opener(engine)


@pytest.fixture(scope="session")
def block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Block]:
    block = Block(
        site="alpha", run_dir=tmp_path_factory.mktemp("block"), num_workers=NUM_RELAYS + 1
    )
    block.start()
    yield block
    block.stop()


@pytest.fixture(scope="session")
def compute_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComputeSite]:
    directory = tmp_path_factory.mktemp("compute")
    with (
        running_globus(directory, limits=PublishedLimits(requests=MANY_REQUESTS)) as globus,
        globus.endpoint("contract", owner="hub", task_environ=TASK_ENVIRON) as endpoint,
        get_rig_pool(globus, "hub", ServiceLimits(max_requests=MANY_REQUESTS)) as pool,
    ):
        config = {"engine": "threads", "workers": 4}
        yield ComputeSite.get(pool, endpoint, directory / "site", config)
        assert globus.violations() == []


@asynccontextmanager
async def open_fake(directory: Path, engine: str) -> AsyncIterator[Rig]:
    instance = get_fixed_delay_engine(get_spec(directory, engine=engine))
    instance.start()
    channel = FakeChannel(instance)
    try:
        yield Rig(channel, lambda: channel.lose("killed"))
    finally:
        await channel.close()
        instance.close()


@asynccontextmanager
async def open_session(directory: Path, engine: str) -> AsyncIterator[Rig]:
    async with serve_hub_end(heartbeat_s=HEARTBEAT_S) as hub:
        spec = get_spec(directory, engine=engine, session_url=hub.url)
        with start_instance(spec) as instance:
            channel = await hub.accept()
            try:
                yield Rig(channel, lambda: instance.process.send_signal(signal.SIGKILL))
            finally:
                await channel.close()


@asynccontextmanager
async def open_direct_route(directory: Path, engine: str) -> AsyncIterator[Rig]:
    spec = get_spec(directory, engine=engine)
    with start_instance(spec) as instance:
        channel = await open_direct(instance.direct_url, spec.direct_token, heartbeat_s=HEARTBEAT_S)
        try:
            yield Rig(channel, lambda: instance.process.send_signal(signal.SIGKILL))
        finally:
            await channel.close()


@asynccontextmanager
async def open_parsl(directory: Path, engine: str, block: Block) -> AsyncIterator[Rig]:
    spec = get_spec(directory, engine=engine)
    with start_instance(spec) as instance:
        relay = ParslRelay(
            block.submit,
            direct_url=instance.direct_url,
            direct_token=spec.direct_token,
            num_relays=NUM_RELAYS,
            poll_s=HEARTBEAT_S,
        )
        channel = await RelayChannel.open(relay)
        try:
            yield Rig(channel, lambda: instance.process.send_signal(signal.SIGKILL))
        finally:
            await channel.close()


@asynccontextmanager
async def open_compute(engine: str, site: ComputeSite) -> AsyncIterator[Rig]:
    figures = RelayFigures(
        max_batches=2,
        max_tasks=64,
        poll_s=HEARTBEAT_S,
        idle_poll_s=HEARTBEAT_S,
        delivery_s=10.0,
    )
    with site.instance(engine) as instance:
        channel = await RelayChannel.open(site.get_relay(instance, figures))
        try:
            yield Rig(channel, instance.kill, COMPUTE_LAG_S)
        finally:
            await channel.close()
    await within(asyncio.wrap_future(instance.ended), 30)


OPENERS = {"fake": open_fake, "session": open_session, "direct": open_direct_route}
SLOW = [
    pytest.param("parsl", marks=pytest.mark.slow),
    pytest.param("compute", marks=[pytest.mark.slow, pytest.mark.globus]),
]


@pytest.fixture(params=[*OPENERS, *SLOW])
def open_rig(request: pytest.FixtureRequest, tmp_path: Path) -> OpenRig:
    """Opens a rig of each kind."""
    kind = request.param
    if kind == "parsl":
        block = request.getfixturevalue("block")
        return OpenRig(lambda engine: open_parsl(tmp_path, engine, block))
    if kind == "compute":
        site = request.getfixturevalue("compute_site")
        return OpenRig(lambda engine: open_compute(engine, site), lag_s=COMPUTE_LAG_S)
    return OpenRig(lambda engine: OPENERS[kind](tmp_path, engine))


@pytest.fixture(params=list(OPENERS))
def open_streaming_rig(request: pytest.FixtureRequest, tmp_path: Path) -> OpenRig:
    """Opens a rig of each kind whose events arrive while the task runs."""
    return OpenRig(lambda engine: OPENERS[request.param](tmp_path, engine))
