"""The channels under contract, each in front of the same engine."""

import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fabric.dispatch.direct import open_direct
from fabric.dispatch.parsl import ParslChannel
from fabric.dispatch.protocol import Channel
from fabric.launch.block import Block
from fabric.testing.channel import FakeChannel
from fabric.testing.instance import get_fixed_delay_engine
from fabric.testing.rig import get_spec, serve_hub_end, start_instance

HEARTBEAT_S = 0.1
NUM_RELAYS = 3


@dataclass(frozen=True)
class Rig:
    """A channel, and how to end its instance as a power cut would."""

    channel: Channel
    kill: Callable[[], object]


OpenRig = Callable[..., AbstractAsyncContextManager[Rig]]


@pytest.fixture(scope="session")
def block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Block]:
    block = Block(
        site="alpha", run_dir=tmp_path_factory.mktemp("block"), num_workers=NUM_RELAYS + 1
    )
    block.start()
    yield block
    block.stop()


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
        channel = await ParslChannel.open(
            block.submit,
            direct_url=instance.direct_url,
            direct_token=spec.direct_token,
            num_relays=NUM_RELAYS,
            poll_s=HEARTBEAT_S,
        )
        try:
            yield Rig(channel, lambda: instance.process.send_signal(signal.SIGKILL))
        finally:
            await channel.close()


OPENERS = {"fake": open_fake, "session": open_session, "direct": open_direct_route}


@pytest.fixture(params=[*OPENERS, pytest.param("parsl", marks=pytest.mark.slow)])
def open_rig(request: pytest.FixtureRequest, tmp_path: Path) -> OpenRig:
    """Opens a rig of each kind; takes the engine's arguments as text."""
    kind = request.param
    if kind == "parsl":
        block = request.getfixturevalue("block")
        return lambda engine="": open_parsl(tmp_path, engine, block)
    return lambda engine="": OPENERS[kind](tmp_path, engine)


@pytest.fixture(params=list(OPENERS))
def open_streaming_rig(request: pytest.FixtureRequest, tmp_path: Path) -> OpenRig:
    """Opens a rig of each kind whose events arrive while the task runs."""
    return lambda engine="": OPENERS[request.param](tmp_path, engine)
