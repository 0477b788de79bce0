"""Globus Auth and Groups alone, on a port of their own, for tests that need no Globus Compute."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from fabric.testing.globus.auth import get_auth_router
from fabric.testing.globus.directory import Account, AuthDirectory
from fabric.testing.hub import wait_until


class AuthService:
    """Serves a directory at ``url``, which stays the same when it stops and starts again.

    ``num_calls`` counts the requests by path.
    """

    def __init__(self, directory: AuthDirectory) -> None:
        self.directory = directory
        self.num_calls: dict[str, int] = {}
        self._app = FastAPI(openapi_url=None)
        self._app.include_router(get_auth_router(directory))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = int(probe.getsockname()[1])
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self._port}/"

    @property
    def environ(self) -> dict[str, str]:
        """What makes globus-sdk in a process ask this service."""
        return {"GLOBUS_SDK_SERVICE_URL_AUTH": self.url, "GLOBUS_SDK_SERVICE_URL_GROUPS": self.url}

    def start(self) -> None:
        """Listen."""
        config = uvicorn.Config(
            self._count,
            interface="asgi3",
            host="127.0.0.1",
            port=self._port,
            log_config=None,
            lifespan="off",
        )
        self._server = server = uvicorn.Server(config)
        self._thread = threading.Thread(target=server.run, name="globus-auth")
        self._thread.start()
        wait_until(lambda: server.started, timeout_s=20)

    def stop(self) -> None:
        """Listen no more: who connects is refused. Calling it twice is harmless."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None and thread is not None:
            server.should_exit = True
            thread.join()

    def browse(self, url: str, account: Account) -> str:
        """Log in at an authorize URL and consent, as in a browser; return the code it shows."""
        page = httpx.get(f"{url}&login_as={account.username}", follow_redirects=True, timeout=20)
        page.raise_for_status()
        return page.text

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.num_calls[scope["path"]] = self.num_calls.get(scope["path"], 0) + 1
        await self._app(scope, receive, send)


@contextmanager
def running_auth(directory: AuthDirectory) -> Iterator[AuthService]:
    """Yield a service that serves until the end of the block."""
    service = AuthService(directory)
    service.start()
    try:
        yield service
    finally:
        service.stop()
