"""The server's settings that the gateway relies on."""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from fabric.messages.session import MAX_FRAME_BYTES

SHUTDOWN_S = 5.0


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
        http="httptools",
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
