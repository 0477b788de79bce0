"""Opens compute channels: the hub's own way to instances that cannot dial it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from fabric.catalog import LaunchRecord
from fabric.compute import ComputePool, ComputeTarget, ServiceLimits
from fabric.dispatch.compute import ComputeRelay
from fabric.dispatch.relay import RelayChannel
from fabric.errors import FabricError
from fabric.gateway import joining
from fabric.messages import Reach
from fabric.payloads import PayloadStore

if TYPE_CHECKING:
    from fabric.gateway.hub import Hub

HUB_REQUESTS = 10
"""The hub's part of the service's requests in a window; the sites' agents share the rest."""

logger = logging.getLogger(__name__)


class Outreach:
    """The compute channels of one hub. Its pool starts with the first of them.

    Args:
        pool: Where their tasks are submitted; one with the hub's own credentials by default.
        stores: Where sites keep results that are too large for the service.
    """

    def __init__(
        self, pool: ComputePool | None = None, stores: Sequence[PayloadStore] = ()
    ) -> None:
        self._pool = pool or ComputePool(ServiceLimits(max_requests=HUB_REQUESTS))
        self._stores = stores
        self._serving: dict[str, asyncio.Task[None]] = {}

    def reach(self, hub: Hub, launch: LaunchRecord, reach: Reach) -> None:
        """Serve an instance in the background until it is gone; harmless while it is served."""
        if launch.instance not in self._serving and launch.ended_at is None:
            task = asyncio.create_task(self._serve(hub, launch, reach))
            self._serving[launch.instance] = task
            task.add_done_callback(lambda _: self._serving.pop(launch.instance, None))

    async def close(self) -> None:
        """End all channels, the pool and the stores."""
        for task in (tasks := list(self._serving.values())):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.close)
        for store in self._stores:
            store.close()

    async def _serve(self, hub: Hub, launch: LaunchRecord, reach: Reach) -> None:
        channel = None
        try:
            channel = await self._open(hub, launch.instance, reach)
            await joining.check(hub, launch, channel.hello)
        except FabricError as error:
            logger.warning("%s was not reached: %s", launch.instance, error.message)
            if channel is not None:
                await channel.close()
            return
        await joining.serve(hub, channel)

    async def _open(self, hub: Hub, instance: str, reach: Reach) -> RelayChannel:
        await asyncio.to_thread(self._pool.start)
        function_id = reach.functions.get("infer")
        if function_id is None:
            record = await hub.offload(
                hub.catalog.function_for, "infer", endpoint_id=str(reach.endpoint_id)
            )
            function_id = UUID(record.id)
        relay = ComputeRelay(
            self._pool,
            ComputeTarget(endpoint_id=reach.endpoint_id, config=reach.config),
            function_id,
            instance=instance,
            direct_token=reach.direct_token,
            run_dir=reach.run_dir,
            stores=self._stores,
        )
        return await RelayChannel.open(relay)
