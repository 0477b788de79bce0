"""The direct route: a WebSocket on this machine for clients at the same site, and the metrics."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from fabric.instance.serve import Peer
from fabric.messages.session import MAX_FRAME_BYTES

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Handle = Callable[[ServerConnection, Peer], Awaitable[None]]


@asynccontextmanager
async def direct_route(
    handle: Handle,
    *,
    token: str,
    guest_token: str | None = None,
    render_metrics: Callable[[], bytes] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[str]:
    """Serve the direct route and yield its URL; open connections are closed at the end.

    Args:
        handle: Serves one accepted connection until it ends, by who is at its other end.
        token: What the hub's channels send as ``Authorization: Bearer <token>``.
        guest_token: What guests send; ``None`` lets none in. Any other is answered 401.
        render_metrics: Makes what ``GET /metrics`` answers, in Prometheus' text format.
        host: The address to listen on.
        port: The port; 0 takes a free one.
    """
    peers: dict[bytes, Peer] = {f"Bearer {token}".encode(): "client"}
    if guest_token is not None:
        peers[f"Bearer {guest_token}".encode()] = "guest"

    def find_peer(request: Request | None) -> Peer | None:
        given = request.headers.get("Authorization", "").encode() if request else b""
        found = [peer for known, peer in peers.items() if hmac.compare_digest(given, known)]
        return found[0] if found else None

    def authorize(connection: ServerConnection, request: Request) -> Response | None:
        if find_peer(request) is None:
            return connection.respond(HTTPStatus.UNAUTHORIZED, "A valid bearer token is needed.\n")
        if render_metrics is None or request.path.partition("?")[0] != "/metrics":
            return None
        response = connection.respond(HTTPStatus.OK, render_metrics().decode())
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = METRICS_TYPE
        return response

    async def serve_one(connection: ServerConnection) -> None:
        if (peer := find_peer(connection.request)) is not None:
            await handle(connection, peer)

    async with serve(
        serve_one,
        host,
        port,
        process_request=authorize,
        compression=None,
        max_size=MAX_FRAME_BYTES,
        close_timeout=1.0,
    ) as server:
        bound_port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://{host}:{bound_port}/"
