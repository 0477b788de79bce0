"""What a route needs of its caller: declared as a dependency, and denied where it is not."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from ipaddress import ip_address
from typing import Any, cast

from fastapi import params
from fastapi.routing import APIRoute
from starlette.exceptions import WebSocketException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.websockets import WebSocket

from fabric.auth import SCOPES, Identity, require
from fabric.errors import AuthError, KeyMissing
from fabric.gateway.hub import hub_of

CLOSE_BAD_TOKEN = 4401
"""The WebSocket close code for a session whose launch token is not accepted."""


PROJECT_HEADER = "fabric-project"
"""How a caller in several projects says for which one it acts."""


class Access:
    """The base of all declarations: what ``undeclared`` looks for."""


class Public(Access):
    """Anyone may call."""

    async def __call__(self) -> None:
        """Let everyone through."""


class Needs(Access):
    """An API key or a Globus login is needed, with ``scope`` unless that is ``None``."""

    def __init__(self, scope: str | None) -> None:
        if scope is not None and scope not in SCOPES:
            raise ValueError(f"there is no scope {scope!r}")
        self.scope = scope

    async def __call__(self, connection: HTTPConnection) -> None:
        """Note the caller in ``connection.state``.

        Raises:
            AuthError: There is no valid credential, or it has not the scope.
        """
        caller = await _identify(connection)
        if self.scope is not None:
            require(caller, self.scope)
        connection.state.caller = caller


class LocalOrNeeds(Needs):
    """As ``Needs``, but callers on this machine need nothing."""

    async def __call__(self, connection: HTTPConnection) -> None:
        """Let local callers through, others with the scope.

        Raises:
            AuthError: The caller is elsewhere and has no valid credential, or not the scope.
        """
        if not _is_local(connection):
            await super().__call__(connection)


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and returns the reply, and nothing else.

    Its caller is checked as declared; FastAPI's search for what else an endpoint may want, most of
    what it adds to a request, is left out.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what serves a request."""
        endpoint = self.endpoint
        (needs,) = (one for one in declarations(self) if isinstance(one, Needs))

        async def serve(request: Request) -> Response:
            await needs(request)
            return cast(Response, await endpoint(request))

        return serve


class NeedsLaunch(Access):
    """The token of a launch is needed: an instance calls."""

    async def __call__(self, websocket: WebSocket) -> None:
        """Accept the connection and note the launch in ``websocket.state``.

        Raises:
            WebSocketException: The token is not valid; the connection is closed with 4401.
        """
        # Only an accepted connection can be told by its close code why it is refused.
        await websocket.accept()
        hub = hub_of(websocket)
        try:
            websocket.state.launch = await hub.offload(
                hub.catalog.authenticate_launch, _bearer(websocket)
            )
        except AuthError as error:
            raise WebSocketException(CLOSE_BAD_TOKEN, error.code) from error


class NeedsInstance(Access):
    """The token of a launch is needed, as an instance has it that asks by HTTP."""

    async def __call__(self, connection: HTTPConnection) -> None:
        """Note the launch in ``connection.state``.

        Raises:
            AuthError: The token is missing or not valid, or its launch has ended.
        """
        token, hub = _bearer(connection), hub_of(connection)
        if not token:
            raise KeyMissing
        connection.state.launch = await hub.offload(hub.catalog.authenticate_launch, token)


def _is_local(connection: HTTPConnection) -> bool:
    """Say whether the caller, or the one a proxy on this machine speaks for, is on this machine."""
    try:
        return connection.client is not None and ip_address(connection.client.host).is_loopback
    except ValueError:
        return False


async def _identify(connection: HTTPConnection) -> Identity:
    project = connection.headers.get(PROJECT_HEADER)
    return await hub_of(connection).authenticator.identify(_bearer(connection), project)


def _bearer(connection: HTTPConnection) -> str | None:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """Return the paths of routes that do not declare what they need, or declare it twice."""
    return [
        getattr(route, "path", repr(route)) for route in routes if len(declarations(route)) != 1
    ]


def declarations(route: BaseRoute) -> list[Access]:
    """Return what a route declares, itself or through its router."""
    needs: list[params.Depends] = getattr(route, "dependencies", [])
    wanted: list[object] = [need.dependency for need in needs]
    return [access for access in wanted if isinstance(access, Access)]
