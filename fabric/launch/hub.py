"""What a site's agent asks of the hub and tells it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from uuid import UUID

import httpx

from fabric.errors import BlockFailed
from fabric.messages import InstanceState, Launch, Reach

REPORT_S = 5.0
"""A report is repeated so often: a hub that was restarted has forgotten the last one."""

MAX_DELAY_S = 2.0

logger = logging.getLogger(__name__)


class SiteHub:
    """The hub, as the agent of one site sees it.

    Args:
        url: The hub's address.
        token: The site's key.
        site: The site's name.
    """

    def __init__(self, url: str, token: str, site: str) -> None:
        self._site = site
        self._http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=5.0
        )
        self._report = (InstanceState.PENDING, "")
        self._reported = asyncio.Event()

    async def close(self) -> None:
        """Tell the last report and end the connections."""
        await self._post_report()
        await self._http.aclose()

    async def add_launch(self, model: str, stopping: asyncio.Event) -> Launch | None:
        """Return a launch, trying until the hub is up; ``None`` if asked to end meanwhile.

        Args:
            model: ``name@revision``.
            stopping: Ends the trying.

        Raises:
            BlockFailed: The hub refuses the launch.
        """
        body = {"site": self._site, "model": model}
        reply = await self._insist("POST", "/v1/fabric/launches", stopping, json=body)
        return None if reply is None else Launch.model_validate_json(reply.content)

    async def functions(self, stopping: asyncio.Event) -> Mapping[str, UUID] | None:
        """Return the registered functions by name; ``None`` if asked to end meanwhile.

        Raises:
            BlockFailed: The hub refuses to tell.
        """
        reply = await self._insist("GET", "/v1/fabric/functions", stopping)
        if reply is None:
            return None
        return {item["name"]: UUID(item["id"]) for item in reply.json()["data"]}

    async def end_launch(self, instance: str, reason: str) -> None:
        """Void a launch that is over."""
        await self._post(f"/v1/fabric/launches/{instance}/end", {"reason": reason[:1000]})

    async def expect(self, instance: str, ready_in_s: float) -> None:
        """Tell when an instance should have joined: requests may wait for it."""
        await self._post(f"/v1/fabric/launches/{instance}/outlook", {"ready_in_s": ready_in_s})

    async def reach(self, instance: str, reach: Reach) -> None:
        """Tell how the hub can reach an instance that does not dial it."""
        await self._post(f"/v1/fabric/launches/{instance}/reach", reach.model_dump(mode="json"))

    def say(self, state: InstanceState, detail: str) -> None:
        """Report how far the site is, if that is news."""
        if self._report != (state, detail):
            self._report = (state, detail)
            self._reported.set()
            logger.info("%s is %s%s", self._site, state, f": {detail}" if detail else "")

    async def keep_reporting(self) -> None:
        """Send what was said, at once and again and again, until cancelled."""
        while True:
            self._reported.clear()
            await self._post_report()
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._reported.wait()

    async def _post_report(self) -> None:
        state, detail = self._report
        await self._post(
            f"/v1/fabric/sites/{self._site}/status", {"state": state, "detail": detail[:1000]}
        )

    async def _post(self, path: str, body: Mapping[str, object]) -> None:
        """Tell the hub something it can do without: it also sees sessions come and go."""
        try:
            (await self._http.post(path, json=body)).raise_for_status()
        except httpx.HTTPError as error:
            logger.info("not told to the hub: %s", error)

    async def _insist(
        self, method: str, path: str, stopping: asyncio.Event, *, json: object = None
    ) -> httpx.Response | None:
        delay_s = 0.1
        while not stopping.is_set():
            try:
                reply = await self._http.request(method, path, json=json)
                if reply.is_success:
                    return reply
                reason = f"the hub answered {reply.status_code}: {reply.text[:500]}"
                if reply.is_client_error and reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    raise BlockFailed(site=self._site, reason=reason)
            except httpx.TransportError as error:
                reason = f"the hub cannot be reached ({error})"
            self.say(InstanceState.PENDING, reason)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await stopping.wait()
            delay_s = min(2 * delay_s, MAX_DELAY_S)
        return None
