"""The direct channel: a session with an instance's own WebSocket, without the hub between."""

from __future__ import annotations

from contextlib import suppress

from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from fabric.dispatch.session import ConnectionLost, SessionChannel
from fabric.errors import ProtocolViolation, SessionLost, SessionRefused
from fabric.messages.session import MAX_FRAME_BYTES


class WebSocketConnection:
    """A ``Connection`` over a WebSocket of the ``websockets`` library."""

    def __init__(self, websocket: Connection) -> None:
        self._websocket = websocket

    async def send(self, text: str) -> None:
        """Send one message."""
        try:
            await self._websocket.send(text)
        except (ConnectionClosed, AttributeError) as error:
            # asyncio's transports (3.11) raise AttributeError when they are closed a second time
            # after their peer left while data was unsent.
            raise ConnectionLost(str(error)) from error

    async def receive(self) -> str:
        """Return the next message."""
        try:
            message = await self._websocket.recv()
        except ConnectionClosed as error:
            raise ConnectionLost(str(error)) from error
        if not isinstance(message, str):
            raise ProtocolViolation(peer="The instance", reason="a binary message")
        return message

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection."""
        with suppress(AttributeError):  # see send
            await self._websocket.close(code, reason)


async def open_direct(url: str, token: str, *, heartbeat_s: float = 2.0) -> SessionChannel:
    """Return a started session with the instance at ``url``.

    Args:
        url: The instance's direct route, ``ws://…``.
        token: Its direct token.
        heartbeat_s: How often the instance shall send heartbeats.

    Raises:
        SessionRefused: The token is not the instance's.
        SessionLost: Nothing answers there.
        ProtocolViolation: What answers is not an instance.
    """
    try:
        websocket = await connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=MAX_FRAME_BYTES,
            close_timeout=1.0,
            proxy=None,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        raise SessionRefused(reason=f"{url} answered {status}") from error
    except (OSError, TimeoutError, InvalidHandshake) as error:
        raise SessionLost(instance=url, reason=f"it cannot be reached ({error})") from error
    channel = await SessionChannel.open(WebSocketConnection(websocket), heartbeat_s=heartbeat_s)
    await channel.welcome()
    return channel
