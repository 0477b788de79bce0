"""One instance's life: load, canary, direct route, session, drain.

The process is given its ``InstanceSpec`` as the first line of standard input and keeps the pipe:
when it closes, the parent is gone, or has written why the instance must end, and it ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

from websockets.asyncio.connection import Connection

from fabric.engine.interface import Engine
from fabric.errors import DigestMismatch, FabricError
from fabric.instance.canary import sing
from fabric.instance.depot import Depot
from fabric.instance.dial import dial
from fabric.instance.direct import direct_route
from fabric.instance.meter import Meter
from fabric.instance.metrics import InstanceMetrics, MeasuredEngine
from fabric.instance.serve import Peer, serve_session
from fabric.messages import Hello, InstanceSpec, InstanceState, InstanceStatus, Limits

Keep = Callable[[bytes], dict[str, object]]
"""Takes a result too large to travel inline, and returns its handle at once; on any thread."""

EngineFactory = Callable[[InstanceSpec, Keep | None], Engine]


MAX_POINTS_BYTES = 4 * 2**20
"""The largest manifest of points that a session begins with."""

logger = logging.getLogger(__name__)


def main(get_engine: EngineFactory) -> NoReturn:
    """Run the instance that standard input describes, and end the process.

    Args:
        get_engine: Returns an engine that has not been started; may import what it needs. It is
            also given where large results go, if the instance has a hub to leave them at.
    """
    spec = InstanceSpec.model_validate_json(sys.stdin.readline())
    instance = Instance(spec, get_engine)
    threading.Thread(target=instance.end_with, args=(sys.stdin,), daemon=True).start()
    try:
        asyncio.run(instance.run())
    except FabricError as error:
        print(error.message, file=sys.stderr)
        instance.leave(InstanceState.FAILED, error.message)
    except Exception as error:
        traceback.print_exc()
        instance.leave(InstanceState.FAILED, f"it failed unexpectedly: {error!r}")
    instance.leave(InstanceState.STOPPED, "drained")


class Instance:
    """An engine and the ways to it.

    Args:
        spec: What to run and where to report.
        get_engine: Returns an engine that has not been started.
    """

    def __init__(self, spec: InstanceSpec, get_engine: EngineFactory) -> None:
        self._spec = spec
        self._launch = spec.launch
        self._get_engine = get_engine
        self._started_at = time.monotonic()
        self._drain = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._meter = Meter(spec.launch.instance)
        self._depot: Depot | None = None
        if spec.session_url is not None:
            launch = spec.launch
            self._depot = Depot(spec.session_url, launch.token, instance=launch.instance)
        self._metrics = InstanceMetrics(spec.launch.model.partition("@")[0])
        self._direct_url: str | None = None
        self._points_fit: bool | None = None
        self._is_unreached = False
        self._num_sessions = 0
        self._idle = asyncio.Event()

    async def run(self) -> None:
        """Serve until drained (SIGTERM, SIGUSR1, SIGINT, or a peer's ``Drain``).

        What still runs ``grace_s`` after SIGTERM fails with ``engine_stopped``.

        Raises:
            FabricError: The model cannot be loaded or is another one than was launched, its canary
                failed, the hub refuses the session or is not reached, or the engine ended by
                itself.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR1, signal.SIGINT):
            loop.add_signal_handler(number, self._drain.set)
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        self.report(InstanceState.LOADING, "reading weights")
        self._engine = await self._load()
        try:
            self.report(InstanceState.LOADING, "generating a canary")
            await sing(self._engine, self._launch.model)
            route = direct_route(
                self._serve,
                token=self._spec.direct_token,
                guest_token=self._spec.guest_token,
                render_metrics=self._metrics.render,
            )
            async with route as url:
                self._direct_url = url
                self.report(InstanceState.READY)
                await self._stay()
            if self._engine.failure.done():
                raise self._engine.failure.result()
        finally:
            await asyncio.to_thread(self._engine.close)

    def report(self, state: InstanceState, detail: str = "") -> None:
        """Write the status file: whole or not at all, and for its owner alone."""
        status = InstanceStatus(
            instance=self._launch.instance,
            model=self._launch.model,
            state=state,
            pid=os.getpid(),
            detail=detail,
            direct_url=self._direct_url,
            guest_token=self._spec.guest_token,
        )
        path = Path(self._spec.status_path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w") as file:
            file.write(status.model_dump_json())
        Path(name).replace(path)

    def end_with(self, stdin: IO[str]) -> None:
        """Block until standard input ends, then end the process at once: failed if it says why."""
        reason = stdin.read().strip()
        if reason:
            self.leave(InstanceState.FAILED, reason)
        self.leave(InstanceState.STOPPED, "its parent process is gone")

    def leave(self, state: InstanceState, detail: str) -> NoReturn:
        """Report and end the process: with code 1 if it failed.

        The interpreter is not asked to end by itself: reading weights cannot be interrupted, and
        threads of torch can hold it for ever.
        """
        self.report(state, detail)
        sys.stderr.flush()
        os._exit(state is InstanceState.FAILED)

    def _terminate(self) -> None:
        """Drain, but not for ever: who sends SIGTERM sends SIGKILL next."""
        self._drain.set()
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_rest())

    async def _end_rest(self) -> None:
        """Give back what still runs after the grace period: the broker sends it elsewhere."""
        await asyncio.sleep(self._spec.grace_s)
        await asyncio.to_thread(self._engine.close)

    async def _load(self) -> Engine:
        """Return the started engine; a drain meanwhile ends the process."""
        load = asyncio.create_task(asyncio.to_thread(self._start_engine))
        drain = asyncio.create_task(self._drain.wait())
        await asyncio.wait([load, drain], return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        if not load.done():
            self.leave(InstanceState.STOPPED, "asked to end while it loaded")
        return load.result()

    def _start_engine(self) -> Engine:
        engine = self._get_engine(self._spec, self._depot.keep if self._depot else None)
        engine.start()
        launch, digest = self._launch, engine.info.digest
        if launch.digest is not None and launch.digest != digest:
            raise DigestMismatch(name=launch.model, expected=launch.digest, actual=digest)
        self._metrics.watch_load(engine)
        return MeasuredEngine(engine, self._metrics)

    async def _stay(self) -> None:
        """Serve until drained and the last session has ended."""
        url = self._spec.session_url
        watch = asyncio.create_task(self._drain_with_engine())
        if url is not None:
            serve = partial(self._serve, peer="hub")
            await dial(
                url,
                self._launch.token,
                serve,
                self._drain,
                join_s=self._spec.join_s,
                on_failure=self._say_unreached,
            )
        await self._drain.wait()
        watch.cancel()
        self.report(InstanceState.DRAINING)
        while self._num_sessions:
            self._idle.clear()
            await self._idle.wait()

    def _say_unreached(self, reason: str) -> None:
        self._is_unreached = True
        self.report(InstanceState.READY, f"the hub cannot be reached ({reason})")

    async def _drain_with_engine(self) -> None:
        # Shielded: who stops waiting does not cancel the engine's future.
        await asyncio.shield(asyncio.wrap_future(self._engine.failure))
        self._drain.set()

    async def _serve(self, connection: Connection, peer: Peer) -> None:
        self._num_sessions += 1
        if peer == "hub" and self._is_unreached:
            self._is_unreached = False
            self.report(InstanceState.READY)
        try:
            await serve_session(
                connection,
                self._engine,
                self._hello(),
                self._drain,
                peer=peer,
                meter=self._meter,
                depot=self._depot,
            )
        finally:
            self._num_sessions -= 1
            self._idle.set()

    def _hello(self) -> Hello:
        info = self._engine.info
        deadline_s = self._spec.deadline_s
        if deadline_s is not None:
            deadline_s -= time.monotonic() - self._started_at
        return Hello(
            instance=self._launch.instance,
            site=self._launch.site,
            model=self._launch.model,
            digest=info.digest,
            limits=self._limits(),
            dtype=info.dtype,
            engine=info.engine,
            direct_url=self._direct_url,
            deadline_s=deadline_s,
            points=info.points if self._tells_points() else None,
        )

    def _tells_points(self) -> bool:
        """Say whether the hub can be told the points; without them it can check no program."""
        points = self._engine.info.points
        if self._points_fit is None:
            size = 0 if points is None else len(points.model_dump_json())
            self._points_fit = size <= MAX_POINTS_BYTES
            if not self._points_fit:
                logger.warning("no programs: the manifest of points has %d bytes", size)
        return points is not None and self._points_fit

    def _limits(self) -> Limits:
        limits = self._engine.info.limits
        modes = tuple(mode for mode in limits.modes if mode != "program")
        return limits if self._tells_points() else limits.model_copy(update={"modes": modes})
