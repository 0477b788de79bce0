"""What is left of a caller's limits, on every reply to it, as clients of OpenAI's API read it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fabric.broker import Standing

if TYPE_CHECKING:
    from fabric.gateway.hub import Hub


class RateHeaders:
    """Middleware: adds ``x-ratelimit-*`` where the caller has a limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve with headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_standing(message: Message) -> None:
            caller = scope.get("state", {}).get("caller")
            if message["type"] == "http.response.start" and caller is not None:
                hub = cast("Hub", scope["app"].state.hub)
                added = get_headers(hub.broker.standing(caller))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, send_with_standing)


def get_headers(standings: Iterable[Standing]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers that tell of limits."""
    for one in standings:
        for name, value in (
            ("limit", str(one.limit)),
            ("remaining", str(one.remaining)),
            ("reset", to_duration(one.reset_s)),
        ):
            yield f"x-ratelimit-{name}-{one.what}".encode(), value.encode()


def to_duration(seconds: float) -> str:
    """Return a time as OpenAI's headers have it: ``1m12s``, ``3s`` or ``20ms``."""
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
