"""The direct route: a WebSocket on this machine for clients at the same site."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from fabric.messages.session import MAX_FRAME_BYTES


@asynccontextmanager
async def direct_route(
    handle: Callable[[ServerConnection], Awaitable[None]],
    *,
    token: str,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[str]:
    """Serve the direct route and yield its URL; open connections are closed at the end.

    Args:
        handle: Serves one accepted connection until it ends.
        token: What clients send as ``Authorization: Bearer <token>``; any other is answered 401.
        host: The address to listen on.
        port: The port; 0 takes a free one.
    """
    expected = f"Bearer {token}".encode()

    def authorize(connection: ServerConnection, request: Request) -> Response | None:
        given = request.headers.get("Authorization", "").encode()
        if hmac.compare_digest(given, expected):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "A valid bearer token is needed.\n")

    async with serve(
        handle,
        host,
        port,
        process_request=authorize,
        compression=None,
        max_size=MAX_FRAME_BYTES,
        close_timeout=1.0,
    ) as server:
        bound_port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://{host}:{bound_port}/"
