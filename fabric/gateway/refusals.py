"""How errors reach a client: in OpenAI's shape, with the taxonomy's codes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fabric.errors import (
    BodyInvalid,
    FabricError,
    NotFound,
    RequestInvalid,
    UnknownParameter,
    UnsupportedParameter,
)
from fabric.gateway.request_ids import HEADER

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}
_SUBJECT = re.compile(r"^(Input|String|List|Tuple|Value|Dictionary|Object) should ")


def refusal_of(
    error: ValidationError, *, within: str = "", rename: Mapping[str, str] | None = None
) -> FabricError:
    """Return what a client is told of a body that does not validate.

    Args:
        error: Only its first finding is told.
        within: The object whose fields were validated, if not the body itself.
        rename: What the client calls a field that has another name inside.
    """
    first = error.errors(include_url=False)[0]
    kind, value, reason = first["type"], first["input"], _SUBJECT.sub("it should ", first["msg"])
    location = list(first["loc"])
    if location and rename:
        location[0] = rename.get(str(location[0]), location[0])
    param = _path([within, *location] if within else location)
    if kind == "json_invalid":
        return BodyInvalid(reason=first["msg"].removeprefix("Invalid JSON: "))
    if kind == "extra_forbidden":
        return UnknownParameter(param=param)
    if kind == "unsupported":
        return UnsupportedParameter(param=param, value=value, reason=reason)
    if kind == "missing":
        return RequestInvalid(param=param, value=None, reason="it is required")
    if kind == "param":
        name = str(first["ctx"]["param"])
        param = _path([*location, name])
        return RequestInvalid(param=param, value=value.get(name), reason=reason)
    if not param:
        return BodyInvalid(reason=f"it holds {type(value).__name__} where an object belongs")
    return RequestInvalid(param=param, value=value, reason=reason.removeprefix("Value error, "))


def _path(location: Sequence[object]) -> str:
    """Return ``messages[0].role`` for ``("messages", 0, "role")``."""
    path = ""
    for part in location:
        if part == "[key]":  # pydantic's mark behind a key that is wrong itself
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def error_object(error: FabricError) -> dict[str, object]:
    """Return the JSON of an error; ``detail`` is ours and lets our SDK rebuild it."""
    return {
        "message": error.message,
        "type": _type(error.http_status),
        "param": error.detail.get("param"),
        "code": error.code,
        "detail": error.detail,
    }


def _type(status: int) -> str:
    default = "server_error" if status >= 500 else "invalid_request_error"
    return _TYPES.get(status, default)


def error_reply(error: FabricError) -> Response:
    """Return the HTTP reply for an error that came before the first byte of an answer."""
    # The retry layer is the broker's: clients that retry by status are told what is worth it.
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    retry_after_s = error.detail.get("retry_after_s")
    if isinstance(retry_after_s, int | float):
        headers["retry-after"] = str(math.ceil(retry_after_s))
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if error.http_status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        headers["connection"] = "close"
    return Response(
        json.dumps({"error": error_object(error)}),
        status_code=error.http_status,
        headers=headers,
        media_type="application/json",
    )


async def on_fabric_error(_request: Request, error: Exception) -> Response:
    """Answer with an error of the taxonomy."""
    assert isinstance(error, FabricError)
    return error_reply(error)


async def on_invalid_query(_request: Request, error: Exception) -> Response:
    """Answer a query parameter that does not validate."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    reason = _SUBJECT.sub("it should ", first["msg"])
    return error_reply(
        RequestInvalid(param=str(first["loc"][-1]), value=first.get("input"), reason=reason)
    )


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses (no such route, or not this method) in the same shape."""
    assert isinstance(error, HTTPException)
    refusal: FabricError = NotFound(kind="route", name=f"{request.method} {request.url.path}")
    reply = error_reply(refusal)
    reply.status_code = error.status_code
    reply.headers.update(error.headers or {})
    return reply


async def on_defect(request: Request, _error: Exception) -> Response:
    """Answer a defect of the hub without telling its insides; the server logs the traceback."""
    request_id = request.state.request_id
    reply = error_reply(
        FabricError(
            "The hub failed on this request, which is a defect of the hub; tell an administrator"
            f" the id {request_id!r}."
        )
    )
    # This reply is made outside of the middleware that names the others.
    reply.headers[HEADER] = request_id
    return reply
