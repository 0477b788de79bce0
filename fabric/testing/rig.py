"""Real instance processes and a hub's end of their sessions, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from websockets.asyncio.server import ServerConnection, serve

from fabric.dispatch.direct import WebSocketConnection
from fabric.dispatch.session import SessionChannel
from fabric.messages import (
    EngineOptions,
    InstanceSpec,
    InstanceState,
    InstanceStatus,
    Launch,
    new_id,
)
from fabric.messages.session import MAX_FRAME_BYTES
from fabric.testing.instance import MODULE


def get_spec(
    directory: Path,
    *,
    engine: str = "",
    session_url: str | None = None,
    site: str = "alpha",
    model: str = "fixed",
    digest: str | None = None,
    token: str = "",
    max_rows: int = 16,
) -> InstanceSpec:
    """Return the spec of an instance around a ``FixedDelayEngine``.

    Args:
        directory: Where it writes its status.
        engine: The engine's arguments, ``token_s=0.01,first_token_s=0.05``.
        session_url: The hub's session route, if it is to dial.
        site: The launch's site.
        model: The launch's model.
        digest: The digest the launch asks for.
        token: The launch token; a random one when empty.
        max_rows: Rows the engine runs at once.
    """
    instance = new_id("instance")
    launch = Launch(
        instance=instance,
        site=site,
        model=model,
        source=f"fixed-delay:{engine}",
        digest=digest,
        token=token or secrets.token_urlsafe(16),
    )
    return InstanceSpec(
        launch=launch,
        session_url=session_url,
        direct_token=secrets.token_urlsafe(16),
        guest_token=secrets.token_urlsafe(16),
        options=EngineOptions(max_rows=max_rows),
        status_path=str(directory / f"{instance}.json"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceProcess:
    """A running ``python -m fabric.testing.instance``."""

    spec: InstanceSpec
    process: subprocess.Popen[bytes]

    def status(self) -> InstanceStatus | None:
        """Return what it last wrote of itself."""
        try:
            return InstanceStatus.model_validate_json(Path(self.spec.status_path).read_bytes())
        except (OSError, ValidationError):
            return None

    def wait_for(self, *states: InstanceState, timeout_s: float = 20.0) -> InstanceStatus:
        """Return the status once it is in one of ``states``.

        Raises:
            TimeoutError: It is in another state after ``timeout_s`` seconds.
        """
        until = time.monotonic() + timeout_s
        while (status := self.status()) is None or status.state not in states:
            if time.monotonic() > until:
                raise TimeoutError(f"the instance is {status} and not {states}")
            time.sleep(0.02)
        return status

    @property
    def direct_url(self) -> str:
        """The direct route of a ready instance."""
        url = self.wait_for(InstanceState.READY).direct_url
        assert url is not None
        return url


@contextmanager
def start_instance(spec: InstanceSpec, module: str = MODULE) -> Iterator[InstanceProcess]:
    """Yield a starting instance process, and kill it at the end if it still runs.

    Args:
        spec: What it is given.
        module: What is run; ``fabric.instance`` for one with a model.
    """
    with subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(spec.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        try:
            yield InstanceProcess(spec=spec, process=process)
        finally:
            process.kill()


class HubEnd:
    """Where instances dial: it welcomes everyone who has the token.

    ``url`` is its session route; ``refuse_with`` closes the next sessions with that code instead.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.refuse_with: int | None = None
        self.connections: list[ServerConnection] = []
        self._channels: asyncio.Queue[SessionChannel] = asyncio.Queue()

    async def accept(self, timeout_s: float = 20.0) -> SessionChannel:
        """Return the next session an instance opened."""
        async with asyncio.timeout(timeout_s):
            return await self._channels.get()

    async def serve(self, websocket: ServerConnection, heartbeat_s: float) -> None:
        """Serve one connection until its session ends."""
        connection = WebSocketConnection(websocket)
        channel = await SessionChannel.open(connection, heartbeat_s=heartbeat_s)
        if self.refuse_with is not None:
            await channel.close("told to refuse", code=self.refuse_with)
            return
        await channel.welcome()
        self.connections.append(websocket)
        self._channels.put_nowait(channel)
        await channel.wait_closed()
        await channel.close()


@asynccontextmanager
async def serve_hub_end(*, heartbeat_s: float = 0.1, port: int = 0) -> AsyncIterator[HubEnd]:
    """Yield a listening ``HubEnd``."""
    async with serve(
        lambda websocket: hub.serve(websocket, heartbeat_s),
        "127.0.0.1",
        port,
        compression=None,
        max_size=MAX_FRAME_BYTES,
        close_timeout=1.0,
    ) as server:
        bound_port = next(iter(server.sockets)).getsockname()[1]
        hub = HubEnd(f"ws://127.0.0.1:{bound_port}/v1/fabric/session")
        yield hub
