"""A site's agent: asks the hub for launches, keeps an instance of each model up, and says how."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fabric.config import ComputeExecutor, LocalExecutor, SiteModel, SiteSpec
from fabric.errors import BlockFailed, LaunchError
from fabric.launch.hub import REPORT_S, SiteHub
from fabric.launch.starter import Launched, Starter, why_ended
from fabric.messages import InstanceSpec, InstanceState, InstanceStatus, Launch, Reach

MAX_FAILURES = 3
STEADY_S = 60.0
"""An instance that was ready so long did not fail to start; failures are counted anew."""

MAX_DELAY_S = 5.0

USUAL_START_S = 30.0
"""What an instance is taken to need until it is ready, before one has shown it."""

_GRACE = 0.75
"""What part of its time to drain an instance lets requests run on before it gives them back."""

logger = logging.getLogger(__name__)


class AgentSpec(BaseModel):
    """Everything an agent needs, given on its standard input because ``token`` is a secret.

    ``drain_s`` is how long running requests may take when the agent is asked to end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: SiteSpec
    hub_url: str
    token: str
    state_dir: Path
    drain_s: float = 8.0
    instance_module: str = "fabric.instance"


class SiteAgent:
    """Runs one site until it is asked to end.

    Args:
        spec: The site, the hub and where to keep state.
    """

    def __init__(self, spec: AgentSpec) -> None:
        self._spec = spec
        self._site = spec.site.name
        self._hub = SiteHub(spec.hub_url, spec.token, self._site)
        self._stopping = asyncio.Event()
        self._starter: Starter | None = None
        self._start_s: dict[str, float] = {}

    async def run(self) -> None:
        """Start what starts instances, keep the models up, and end all on SIGTERM or SIGINT.

        Raises:
            LaunchError: Nothing can be started here, or a model failed three times in a row.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        reporting = asyncio.create_task(self._hub.keep_reporting())
        try:
            await self._keep_all()
            self._hub.say(InstanceState.STOPPED, "asked to end")
        except LaunchError as error:
            self._hub.say(InstanceState.FAILED, error.message)
            raise
        finally:
            if self._starter is not None:
                await asyncio.to_thread(self._starter.stop)
            reporting.cancel()
            await self._hub.close()

    async def _keep_all(self) -> None:
        self._starter = starter = await self._get_starter()
        if starter is None:
            return
        self._hub.say(InstanceState.STARTING, "getting ready to launch")
        await asyncio.to_thread(starter.start)
        models = [self._keep(model, starter) for model in self._spec.site.models]
        for end in await asyncio.gather(*models, return_exceptions=True):
            if isinstance(end, BaseException):
                raise end

    async def _get_starter(self) -> Starter | None:
        """Return what the site's file says starts instances; ``None`` if asked to end meanwhile."""
        site = self._spec.site
        match site.executor:
            case LocalExecutor(worker_init=worker_init):
                from fabric.launch.block import Block

                return Block(
                    site=site.name,
                    run_dir=self._spec.state_dir,
                    num_workers=len(site.models),
                    worker_init=worker_init,
                    instance_module=self._spec.instance_module,
                    drain_s=self._spec.drain_s,
                )
            case ComputeExecutor() as executor:
                from fabric.launch.compute import ComputeStarter

                functions = executor.functions or await self._hub.functions(self._stopping)
                if functions is None:
                    return None
                return ComputeStarter(site=site.name, executor=executor, functions=functions)

    # ---- instances ---------------------------------------------------------------------------

    async def _keep(self, model: SiteModel, starter: Starter) -> None:
        """Launch a model, and again whenever its instance ends.

        Raises:
            BlockFailed: It ended three times without having been ready for a minute.
        """
        failures = 0
        while not self._stopping.is_set():
            launch = await self._hub.add_launch(f"{model.name}@{model.revision}", self._stopping)
            if launch is None:
                return
            await asyncio.to_thread(starter.revive)
            launched = starter.launch(self._get_spec(launch, model, starter))
            ready_s = await self._watch(launched, starter)
            reason = await asyncio.to_thread(why_ended, launched)
            await self._hub.end_launch(launch.instance, reason)
            if self._stopping.is_set():
                return
            failures = 1 if ready_s >= STEADY_S else failures + 1
            logger.warning("%s ended: %s", launch.instance, reason)
            if failures >= MAX_FAILURES:
                raise BlockFailed(
                    site=self._site,
                    reason=f"{failures} instances of {model.name!r} ended in a row; {reason}",
                    log_path=str(launched.log_path),
                )
            self._hub.say(InstanceState.STARTING, f"starting again after: {reason}")
            await self._pause(min(2.0**failures / 2, MAX_DELAY_S))

    async def _watch(self, launched: Launched, starter: Starter) -> float:
        """Report what an instance says of itself until it ends; return how long it was ready."""
        launch, began_at = launched.spec.launch, time.monotonic()
        ready_at = None
        reached_at = told_at = -REPORT_S
        while not launched.ended.done():
            if ready_at is None and time.monotonic() - told_at >= REPORT_S:
                told_at = time.monotonic()
                start_s = self._start_s.get(launch.model, USUAL_START_S)
                await self._hub.expect(launch.instance, max(0.0, start_s - (told_at - began_at)))
            status = await asyncio.to_thread(launched.status)
            if status is not None:
                self._hub.say(InstanceState(status.state), status.detail)
                if status.state == InstanceState.READY:
                    if ready_at is None:
                        ready_at = time.monotonic()
                        self._start_s[launch.model] = ready_at - began_at
                    if time.monotonic() - reached_at >= REPORT_S:
                        reached_at = time.monotonic()
                        await self._tell_reach(launched, status)
            await self._pause(starter.poll_s)
            if self._stopping.is_set():
                await self._drain(launched, starter)
                break
        return 0.0 if ready_at is None else time.monotonic() - ready_at

    async def _tell_reach(self, launched: Launched, status: InstanceStatus) -> None:
        """Tell the hub the way to an instance that does not dial it, again and again."""
        executor = self._spec.site.executor
        if isinstance(executor, ComputeExecutor) and executor.channel == "compute":
            reach = Reach(
                endpoint_id=executor.endpoint_id,
                config=executor.config,
                functions=executor.functions,
                run_dir=executor.run_dir,
                direct_token=launched.spec.direct_token,
            )
            await self._hub.reach(status.instance, reach)

    async def _drain(self, launched: Launched, starter: Starter) -> None:
        self._hub.say(InstanceState.DRAINING, "asked to end")
        if not await asyncio.to_thread(launched.stop):
            return
        ended = asyncio.shield(asyncio.wrap_future(launched.ended))
        with suppress(Exception):
            async with asyncio.timeout(starter.drain_s):
                await ended

    def _get_spec(self, launch: Launch, model: SiteModel, starter: Starter) -> InstanceSpec:
        # http://… becomes ws://…, and https://… wss://….
        hub_url = self._spec.hub_url.rstrip("/").replace("http", "ws", 1)
        executor = self._spec.site.executor
        dials = isinstance(executor, LocalExecutor) or executor.channel == "session"
        return InstanceSpec(
            launch=launch,
            session_url=hub_url + launch.session_path if dials else None,
            direct_token=secrets.token_urlsafe(32),
            options=model.options,
            status_path=str(self._spec.state_dir.absolute() / f"{launch.instance}.json"),
            grace_s=_GRACE * starter.drain_s,
        )

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
