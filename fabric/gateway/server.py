"""The server's settings that the gateway relies on."""

from __future__ import annotations

import asyncio
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fabric.messages.session import MAX_FRAME_BYTES

SHUTDOWN_S = 5.0

_HEAD = b"HTTP/1.1 "
"""What the head of a reply begins with; anything else that does is only written a little later."""


def get_server_config(app: ASGIApp, *, host: str, port: int) -> uvicorn.Config:
    """Return uvicorn's configuration for the gateway.

    Args:
        app: The application.
        host: The address to listen on.
        port: The port; 0 takes a free one.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=_Http,
        ws="websockets-sansio",
        ws_max_size=MAX_FRAME_BYTES,
        # Frames are small and many: compressing each costs more than it saves.
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(SHUTDOWN_S),
    )


class _Http(HttpToolsProtocol):
    """HTTP as uvicorn speaks it, over an ``_Envelope``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Envelope(transport, self.loop)))


class _Envelope:
    """A transport by which the head of a reply goes out together with what follows it.

    uvicorn writes them one after the other: twice the system calls for a whole reply.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """Write; a head waits for the next piece, or for the loop's next turn."""
        if data.startswith(_HEAD) and not self._head:
            self._head = data
            self._loop.call_soon(self._flush)
            return
        head, self._head = self._head, b""
        self._transport.write(head + data)

    def close(self) -> None:
        """Close once all is written."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._head:
            self.write(b"")
