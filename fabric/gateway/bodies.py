"""Reading bodies: capped as they come, and validated at once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fabric.errors import BodyInvalid, BodyTooLarge, RequestCancelled
from fabric.gateway.refusals import refusal_of

BodyT = TypeVar("BodyT", bound=BaseModel)

PART_PREFIX = "Body"
"""Sets what bodies are made of apart from replies of the same name."""


class BodyLimit:
    """Middleware: whoever reads a body over the cap gets ``BodyTooLarge`` instead of the rest.

    A body that declares its size is refused before any of it is read, others when they pass the
    cap. Being raised where the body is read, the error comes after the check of the caller's key.

    Args:
        app: What is served.
        limit_bytes: The cap.
        at_path_bytes: Paths with a cap of their own.
    """

    def __init__(
        self, app: ASGIApp, *, limit_bytes: int, at_path_bytes: Mapping[str, int] | None = None
    ) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._at_path_bytes = at_path_bytes or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve with a counting ``receive``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        limit_bytes = self._at_path_bytes.get(scope["path"], self._limit_bytes)
        num_bytes = 0

        async def receive_capped() -> Message:
            nonlocal num_bytes
            if declared.isdecimal() and int(declared) > limit_bytes:
                raise BodyTooLarge(limit_bytes=limit_bytes)
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit_bytes:
                raise BodyTooLarge(limit_bytes=limit_bytes)
            return message

        await self._app(scope, receive_capped, send)


async def read_body(request: Request, model: type[BodyT]) -> BodyT:
    """Return the body as ``model``.

    Raises:
        BodyTooLarge: It is over the cap.
        BodyInvalid: It is not a JSON object in UTF-8.
        RequestInvalid: A parameter is unknown, missing or of the wrong type.
        RequestCancelled: The client went away before it had sent it.
    """
    try:
        data = await request.body()
    except ClientDisconnect:
        raise RequestCancelled from None
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        try:
            data.decode()
        except UnicodeDecodeError as decoding:
            raise BodyInvalid(reason=f"byte {decoding.start} is not UTF-8") from None
        raise refusal_of(error) from None


def documented(*models: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a route that reads its body as one of these with ``read_body``;
    what they are made of is where ``with_parts`` puts it."""
    template = f"#/components/schemas/{PART_PREFIX}{{model}}"
    schemas = [model.model_json_schema(ref_template=template) for model in models]
    schema = schemas[0]
    if len(schemas) > 1:
        parts = [schema.pop("$defs", {}) for schema in schemas]
        schema = {
            "anyOf": schemas,
            "$defs": {name: one for some in parts for name, one in some.items()},
        }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def with_parts(openapi: Mapping[str, Any]) -> dict[str, Any]:
    """Return an OpenAPI document in which the parts of all ``documented`` bodies are found."""
    whole: dict[str, Any] = deepcopy(dict(openapi))
    parts = whole.setdefault("components", {}).setdefault("schemas", {})
    for operation in (one for path in whole["paths"].values() for one in path.values()):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for name, part in content["schema"].pop("$defs", {}).items():
                parts[PART_PREFIX + name] = part
    return whole
