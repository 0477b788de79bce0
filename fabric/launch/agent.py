"""A site's agent: asks the hub for launches, keeps an instance of each model up, and says how."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict

from fabric.config import SiteModel, SiteSpec
from fabric.errors import BlockFailed
from fabric.launch.block import Block, LaunchedInstance
from fabric.messages import InstanceSpec, InstanceState, Launch

POLL_S = 0.1
REPORT_S = 5.0
"""A report is repeated so often: a hub that was restarted has forgotten the last one."""

MAX_FAILURES = 3
STEADY_S = 60.0
"""An instance that was ready so long did not fail to start; failures are counted anew."""

MAX_DELAY_S = 5.0

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
        self._block = Block(
            site=self._site,
            run_dir=spec.state_dir,
            num_workers=len(spec.site.models),
            worker_init=spec.site.executor.worker_init,
            instance_module=spec.instance_module,
        )
        self._hub = httpx.AsyncClient(
            base_url=spec.hub_url,
            headers={"Authorization": f"Bearer {spec.token}"},
            timeout=5.0,
        )
        self._stopping = asyncio.Event()
        self._report = (InstanceState.PENDING, "")
        self._reported = asyncio.Event()

    async def run(self) -> None:
        """Start the block, keep the site's models up, and end all on SIGTERM or SIGINT.

        Raises:
            BlockFailed: The block did not start, or a model failed three times in a row.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        reporting = asyncio.create_task(self._keep_reporting())
        try:
            self._say(InstanceState.STARTING, "starting a block")
            await asyncio.to_thread(self._block.start)
            models = [self._keep(model) for model in self._spec.site.models]
            ends = await asyncio.gather(*models, return_exceptions=True)
            for end in ends:
                if isinstance(end, BaseException):
                    raise end
            self._say(InstanceState.STOPPED, "asked to end")
        except BlockFailed as error:
            self._say(InstanceState.FAILED, error.message)
            raise
        finally:
            await asyncio.to_thread(self._block.stop)
            reporting.cancel()
            await self._post_report()
            await self._hub.aclose()

    # ---- instances ---------------------------------------------------------------------------

    async def _keep(self, model: SiteModel) -> None:
        """Launch a model, and again whenever its instance ends.

        Raises:
            BlockFailed: It ended three times without having been ready for a minute.
        """
        failures = 0
        while not self._stopping.is_set():
            launch = await self._ask_launch(model)
            if launch is None:
                return
            await asyncio.to_thread(self._block.revive)
            launched = self._block.launch(self._get_spec(launch, model))
            ready_s = await self._watch(launched)
            reason = _why_ended(launched)
            await self._post(f"/v1/fabric/launches/{launch.instance}/end", reason=reason)
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
            self._say(InstanceState.STARTING, f"starting again after: {reason}")
            await self._pause(min(2.0**failures / 2, MAX_DELAY_S))

    async def _watch(self, launched: LaunchedInstance) -> float:
        """Report what an instance says of itself until it ends; return how long it was ready."""
        ready_at = None
        while not launched.ended.done():
            status = launched.status()
            if status is not None:
                self._say(InstanceState(status.state), status.detail)
                if status.state == InstanceState.READY and ready_at is None:
                    ready_at = time.monotonic()
            await self._pause(POLL_S)
            if self._stopping.is_set():
                await self._drain(launched)
                break
        return 0.0 if ready_at is None else time.monotonic() - ready_at

    async def _drain(self, launched: LaunchedInstance) -> None:
        self._say(InstanceState.DRAINING, "asked to end")
        if not launched.stop():
            return
        ended = asyncio.shield(asyncio.wrap_future(launched.ended))
        with suppress(Exception):
            await asyncio.wait_for(ended, self._spec.drain_s)

    def _get_spec(self, launch: Launch, model: SiteModel) -> InstanceSpec:
        # http://… becomes ws://…, and https://… wss://….
        hub_url = self._spec.hub_url.rstrip("/").replace("http", "ws", 1)
        return InstanceSpec(
            launch=launch,
            session_url=hub_url + launch.session_path,
            direct_token=secrets.token_urlsafe(32),
            options=model.options,
            status_path=str(self._spec.state_dir.absolute() / f"{launch.instance}.json"),
        )

    # ---- the hub -----------------------------------------------------------------------------

    async def _ask_launch(self, model: SiteModel) -> Launch | None:
        """Return a launch, trying until the hub is up; ``None`` if asked to end meanwhile.

        Raises:
            BlockFailed: The hub refuses the launch.
        """
        body = {"site": self._site, "model": f"{model.name}@{model.revision}"}
        delay_s = 0.1
        while not self._stopping.is_set():
            try:
                reply = await self._hub.post("/v1/fabric/launches", json=body)
                if reply.is_success:
                    return Launch.model_validate_json(reply.content)
                reason = f"the hub answered {reply.status_code}: {reply.text[:500]}"
                if reply.is_client_error and reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    raise BlockFailed(site=self._site, reason=reason)
            except httpx.TransportError as error:
                reason = f"the hub cannot be reached ({error})"
            self._say(InstanceState.PENDING, reason)
            await self._pause(delay_s)
            delay_s = min(2 * delay_s, 2.0)
        return None

    def _say(self, state: InstanceState, detail: str) -> None:
        if self._report != (state, detail):
            self._report = (state, detail)
            self._reported.set()
            logger.info("%s is %s%s", self._site, state, f": {detail}" if detail else "")

    async def _keep_reporting(self) -> None:
        while True:
            self._reported.clear()
            await self._post_report()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reported.wait(), REPORT_S)

    async def _post_report(self) -> None:
        state, detail = self._report
        await self._post(f"/v1/fabric/sites/{self._site}/status", state=state, detail=detail)

    async def _post(self, path: str, **body: str) -> None:
        """Tell the hub something it can do without: it also sees sessions come and go."""
        try:
            (await self._hub.post(path, json=body)).raise_for_status()
        except httpx.HTTPError as error:
            logger.info("not told to the hub: %s", error)

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay_s)


def _why_ended(launched: LaunchedInstance) -> str:
    """Return why an instance ended, in its own words if it had any."""
    if not launched.ended.done():
        return "it was stopped before its requests were done"
    error = launched.ended.exception()
    if error is not None:
        return f"its worker was lost ({error})"
    status = launched.status()
    if status is not None and InstanceState(status.state).final and status.detail:
        return status.detail.rstrip(".")
    return f"its process ended with code {launched.ended.result()}"
