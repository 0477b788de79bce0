"""How an instance becomes a replica, whichever channel it is reached by."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fabric.catalog import LaunchRecord
from fabric.dispatch.protocol import Channel
from fabric.errors import FabricError, NotFound, SessionRefused
from fabric.gateway.hub import Hub, SiteReport
from fabric.messages import Hello, InstanceState

DRAIN_S = 600.0
"""How long an instance whose launch was ended may go on with what it runs."""


async def check(hub: Hub, launch: LaunchRecord, hello: Hello) -> None:
    """Refuse an instance that is not the one its launch permits.

    Raises:
        SessionRefused: It says it is another instance, site or model.
        DigestMismatch: Its tensors are not the version's.
        UnknownModel: The version was forgotten meanwhile.
    """
    for what, said, permitted in (
        ("instance", hello.instance, launch.instance),
        ("site", hello.site, launch.site),
        ("model", hello.model, launch.model),
    ):
        if said != permitted:
            raise SessionRefused(reason=f"its launch permits the {what} {permitted}, not {said}")
    if hello.points is not None and hello.points.digest != hello.digest:
        raise SessionRefused(reason="its points are of another model than it serves")
    await hub.offload(hub.catalog.register_digest, launch.model, hello.digest)


def expect(hub: Hub, launch: LaunchRecord, ready_in_s: float) -> None:
    """Let requests wait for the instance of a launch, unless the launch is over."""
    if launch.ended_at is None:
        hub.broker.arrivals.expect(
            launch.instance, site=launch.site, model=launch.model, ready_in_s=ready_in_s
        )


async def serve(
    hub: Hub, channel: Channel, welcome: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Let the broker use a checked channel until it ends, and close it.

    Args:
        hub: Where the instance joins.
        channel: The way to it.
        welcome: Tells the instance that it is accepted, if it waits for that.
    """
    instance, site = channel.hello.instance, channel.hello.site
    if (former := hub.channels.get(instance)) is not None:
        # The instance comes again only when it has lost a channel: this one cannot be alive.
        await former.close("the instance dialled again")
    hub.channels[instance] = channel
    try:
        if welcome is not None:
            await welcome()
        hub.broker.attach(channel)
        hub.reports[site] = SiteReport(state=InstanceState.READY, detail="")
        await _note(hub, instance, InstanceState.READY)
        await _wait_over(hub, channel)
    finally:
        if hub.channels.get(instance) is channel:
            del hub.channels[instance]
        await channel.close()
        state = InstanceState.STOPPED if channel.draining else InstanceState.LOST
        hub.reports[site] = SiteReport(state=state, detail="")
        await _note(hub, instance, state)


async def _wait_over(hub: Hub, channel: Channel) -> None:
    """Return once a channel is closed, or the instance's launch was ended and it has drained."""
    closed = asyncio.ensure_future(channel.wait_closed())
    try:
        while not closed.done():
            await asyncio.wait([closed], timeout=hub.settings.recheck_s)
            if not closed.done() and await _is_ended(hub, channel.hello.instance):
                await channel.drain("its launch was ended")
                await asyncio.wait([closed], timeout=DRAIN_S)
                return
    finally:
        closed.cancel()


async def _is_ended(hub: Hub, instance: str) -> bool:
    try:
        launch = await hub.offload(hub.catalog.launch, instance)
    except NotFound:  # its site was deleted
        return True
    except FabricError:  # the database is busy, which says nothing of the launch
        return False
    return launch.ended_at is not None


async def _note(hub: Hub, instance: str, state: InstanceState) -> None:
    # A site that was deleted has taken its launches with it.
    with suppress(NotFound):
        await hub.offload(hub.catalog.set_launch_state, instance, state)
