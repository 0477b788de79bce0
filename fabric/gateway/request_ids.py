"""The id on every reply: the run's where there is one."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fabric.messages import new_id

HEADER = "x-request-id"


class RequestIds:
    """Middleware: gives a request an id, and every reply the id the request has by then."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve with an id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = new_id("req")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (HEADER.encode(), state["request_id"].encode())
                message["headers"] = [*message["headers"], header]
            await send(message)

        await self._app(scope, receive, send_with_id)


def name_after_run(connection: HTTPConnection, run_id: str) -> None:
    """Let the reply carry a run's id."""
    connection.state.request_id = run_id
