"""``/v1/fabric/session``: where instances dial in and become replicas."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from fastapi import APIRouter, Depends
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fabric.catalog import LaunchRecord
from fabric.dispatch.session import ConnectionLost, SessionChannel
from fabric.errors import DispatchError, FabricError, ProtocolViolation
from fabric.gateway import joining
from fabric.gateway.access import NeedsLaunch
from fabric.gateway.hub import Hub, hub_of
from fabric.gateway.raw_calls import SessionTill

CLOSE_REFUSED = 4409
"""The close code for an instance that is not what its launch permits; it does not dial again."""

CLOSE_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/fabric", dependencies=[Depends(NeedsLaunch())])


class ServerConnection:
    """A ``fabric.dispatch.session.Connection`` over an accepted WebSocket."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def send(self, text: str) -> None:
        """Send one message."""
        try:
            await self._websocket.send_text(text)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionLost("the connection was closed") from error

    async def receive(self) -> str:
        """Return the next message."""
        if self._websocket.client_state is WebSocketState.DISCONNECTED:
            raise ConnectionLost("the connection was closed")
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            reason = message.get("reason") or f"it was closed with code {message['code']}"
            raise ConnectionLost(reason)
        text = message.get("text")
        if not isinstance(text, str):
            raise ProtocolViolation(peer="The instance", reason="a binary message")
        return text

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection, whether or not the peer still reads."""
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._websocket.close(code, reason)


@router.websocket("/session")
async def serve_session(websocket: WebSocket) -> None:
    """Serve the session of one instance until it ends."""
    hub: Hub = hub_of(websocket)
    launch: LaunchRecord = websocket.state.launch
    try:
        channel = await SessionChannel.open(
            ServerConnection(websocket), heartbeat_s=hub.settings.heartbeat_s
        )
    except DispatchError as error:
        logger.warning("session not opened", extra={"instance": launch.instance, "why": error.code})
        return
    try:
        await joining.check(hub, launch, channel.hello)
    except FabricError as error:
        logger.warning("session refused", extra={"instance": launch.instance, "why": error.code})
        await channel.close(error.message, code=CLOSE_REFUSED)
        return
    channel.till = SessionTill(hub, channel.hello)
    await joining.serve(hub, channel, channel.welcome)
