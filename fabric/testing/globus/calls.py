"""What the stand-in's routes of Globus Auth and Groups share: who calls, and refusals."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from fabric.testing.globus.directory import AuthDirectory, Grant


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, error: str, detail: str = "") -> None:
        super().__init__(error)
        code = error.upper()
        title = code.replace("_", " ").capitalize()
        cause = {"status": str(status), "id": str(uuid.uuid1()), "code": code, "title": title}
        cause["detail"] = detail or title
        body = {"errors": [cause], "error_description": detail or title, "error": error}
        self.reply = JSONResponse(body, status)


class RefusingRoute(APIRoute):
    """Answers with what is refused."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Refused as refused:
                return refused.reply

        return answer


def token_of_bearer(
    directory: AuthDirectory, request: Request, server: str, scopes: Iterable[str]
) -> Grant:
    """Return the token a request came with; it must be the server's and have one of the scopes."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    grant = directory.grant(value, "access") if scheme == "Bearer" else None
    if grant is None or grant.resource_server != server:
        raise Refused(401, "unauthorized", "Call must be authenticated")
    wanted = set(scopes)
    if wanted and not wanted & set(grant.scope.split()):
        raise Refused(403, "forbidden", "The token has not the scope for this")
    return grant
