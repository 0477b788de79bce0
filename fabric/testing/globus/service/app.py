"""The stand-in as one application."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from pydantic import JsonValue

from fabric.testing.globus.auth import AuthDirectory, get_auth_router
from fabric.testing.globus.service.access import Access, Rejected
from fabric.testing.globus.service.endpoints import get_endpoint_router
from fabric.testing.globus.service.functions import get_function_router
from fabric.testing.globus.service.queues import Queues
from fabric.testing.globus.service.records import RequestLog
from fabric.testing.globus.service.results import Results
from fabric.testing.globus.service.settings import ServiceSettings
from fabric.testing.globus.service.store import Store
from fabric.testing.globus.service.submission import Submission, get_submission_router
from fabric.testing.globus.service.tasks import get_task_router

VERSION = "1.23.0"
LOWEST_CLIENT = "2.0.0"


def create_app(settings: ServiceSettings) -> FastAPI:
    """Return the service: its HTTP routes, and the consumers that run while it does."""
    store = Store(settings.database)
    queues = Queues(settings.broker)
    directory = AuthDirectory(path=settings.directory)
    access = Access(directory, store, settings.limits)
    submission = Submission(access, store, queues, directory, settings.limits)
    results = Results(store, queues, submission, settings.limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        store.open()
        queues.start()
        for queue in ("results", "heartbeats"):
            queues.consume(queue, results.handle)
        yield
        queues.close()
        store.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.access = access

    @app.exception_handler(Rejected)
    async def answer(_: Request, rejected: Rejected) -> Response:
        return rejected.reply

    @app.middleware("http")
    async def log(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        store.add_request(
            RequestLog(
                id=secrets.token_hex(8),
                at=time.time(),
                user=getattr(request.state, "user", ""),
                method=request.method,
                path=request.url.path,
                status=response.status_code,
            )
        )
        return response

    @app.get("/v2/version")
    def version(request: Request, service: str = "api") -> JsonValue:
        if "authorization" in request.headers:
            access.caller(request)
        if service != "all":
            return VERSION
        lowest = ("min_sdk_version", "min_ep_version", "min_endpoint_version")
        return {"api": VERSION, "git_sha": "", **dict.fromkeys(lowest, LOWEST_CLIENT)}

    app.include_router(get_auth_router(directory))
    app.include_router(get_endpoint_router(access, store, queues))
    app.include_router(get_function_router(access, store))
    app.include_router(get_submission_router(submission))
    app.include_router(get_task_router(store, queues))
    return app
