"""Server-sent events: their framing, and the reply that carries them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from json.encoder import encode_basestring_ascii as quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

__all__ = ["DONE", "EventStream", "frame", "quote"]


def frame(data: str) -> bytes:
    """Return ``data``, one line of JSON in ASCII, as an event."""
    return f"data: {data}\n\n".encode("ascii")


class EventStream(Response):
    """A reply of events that are sent as they come, each at once.

    Args:
        first: What is sent first; it has come already, so the status is settled.
        rest: What follows; closed when the reply ends, however it ends.
        headers: More headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send it."""
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for chunk in self._rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._rest.aclose()
