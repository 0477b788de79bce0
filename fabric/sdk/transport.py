"""HTTP to the hub: one connection pool, the hub's errors as ours, one retry."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import IO, Any

import httpx

from fabric.errors import FabricError, HubUnreachable, SettingInvalid

CONNECT_TIMEOUT_S = 5.0
RETRY_DELAY_S = 0.25
MAX_RETRY_DELAY_S = 15.0
"""A hub that asks for more patience than this is not waited for; the caller is told."""

STREAM = "text/event-stream"

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class KeyAuth(httpx.Auth):
    """Sends an API key."""

    def __init__(self, api_key: str) -> None:
        self._header = f"Bearer {api_key}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Yield the request with the key."""
        request.headers["authorization"] = self._header
        yield request


class Transport:
    """Sends requests and returns what the hub answered.

    A request is sent again at most ``num_retries`` times, only if the error says that it may
    succeed later, and only while no byte of an answer has arrived.

    Args:
        base_url: The hub's address, with or without ``/v1``.
        auth: Adds the credential to each request; ``None`` sends none.
        project: For which of the caller's projects it acts.
        timeout_s: How long the hub may say nothing.
        num_retries: How often to send again.
    """

    def __init__(
        self,
        *,
        base_url: str,
        auth: httpx.Auth | None,
        timeout_s: float,
        num_retries: int,
        project: str | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._num_retries = num_retries
        self._client = httpx.AsyncClient(
            base_url=self._check_url(self._base_url),
            auth=auth,
            headers={"Fabric-Project": project} if project else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # A cluster's web proxy cannot reach this machine's own loopback.
            trust_env=httpx.URL(self._base_url).host not in _LOOPBACK,
        )

    async def get(self, path: str, params: Mapping[str, str | int] | None = None) -> Any:
        """Return the JSON at ``path``.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return (await self._send("GET", path, params=params)).json()

    async def post(self, path: str, body: object, *, deadline_s: float | None = None) -> Any:
        """Post ``body`` and return the JSON that comes back.

        Args:
            path: The route.
            body: JSON.
            deadline_s: When the hub gives the request up.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return (await self._send("POST", path, json=body, deadline_s=deadline_s)).json()

    async def delete(self, path: str) -> Any:
        """Delete what is at ``path`` and return the JSON that comes back.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return (await self._send("DELETE", path)).json()

    async def get_text(self, path: str) -> str:
        """Return the text at ``path``.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return (await self._send("GET", path)).text

    async def get_bytes(self, path: str) -> bytes:
        """Return the file at ``path``.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return (await self._send("GET", path, expected="application/octet-stream")).content

    async def put_bytes(self, path: str, data: bytes) -> Any:
        """Put a file and return the JSON that comes back.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return (await self._send("PUT", path, content={"content": data})).json()

    async def upload(
        self, path: str, files: Mapping[str, tuple[str, IO[bytes]]], form: Mapping[str, str]
    ) -> Any:
        """Post a form with files, each with its name, and return the JSON that comes back.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        content = {"files": files, "data": form}
        return (await self._send("POST", path, content=content)).json()

    async def open_stream(
        self, path: str, body: object, *, deadline_s: float | None = None
    ) -> httpx.Response:
        """Post ``body`` and return the response before its body is read; the caller closes it.

        Raises:
            FabricError: The hub refused, or cannot be reached.
        """
        return await self._send("POST", path, json=body, deadline_s=deadline_s, expected=STREAM)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        json: object = None,
        content: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        expected: str = "application/json",
    ) -> httpx.Response:
        # The hub itself reports a passed deadline; give that report time to arrive.
        read_s = max(self._timeout_s, deadline_s + 5.0 if deadline_s else 0.0)
        max_delay_s = min(MAX_RETRY_DELAY_S, deadline_s or MAX_RETRY_DELAY_S)
        request = self._client.build_request(
            method, path, params=params, json=json, **content or {}
        )
        request.extensions["timeout"] = {**request.extensions["timeout"], "read": read_s}
        for retries_left in range(self._num_retries, -1, -1):
            try:
                return await self._send_once(request, read_s=read_s, expected=expected)
            except FabricError as error:
                delay_s = _retry_delay_s(error)
                if not (retries_left and error.retryable and delay_s <= max_delay_s):
                    raise
            await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    async def _send_once(
        self, request: httpx.Request, *, read_s: float, expected: str
    ) -> httpx.Response:
        try:
            response = await self._client.send(request, stream=True)
            is_ours = response.headers.get("content-type", "").startswith(expected)
            try:
                if expected == STREAM and is_ours and response.is_success:
                    return response
                await response.aread()
            except BaseException:
                await response.aclose()
                raise
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise FabricError.rebuild(
                "deadline_exceeded",
                f"The hub at {self._base_url} sent nothing for {read_s:g} s; allow more time with"
                " timeout_s, or ask for fewer tokens.",
                {"timeout_s": read_s},
            ) from error
        except httpx.TransportError as error:
            raise HubUnreachable(url=self._base_url, reason=_reason(error)) from error
        if not response.is_success:
            raise self._to_error(response)
        if not is_ours:
            raise self._not_a_hub(response)
        return response

    def _to_error(self, response: httpx.Response) -> FabricError:
        try:
            error = read_error(response.json())
        except (ValueError, KeyError, TypeError):
            return self._not_a_hub(response)
        with suppress(ValueError):
            error.detail["retry_after_s"] = float(response.headers.get("retry-after", ""))
        if request_id := response.headers.get("x-request-id"):
            error.detail["request_id"] = request_id
        return error

    def _not_a_hub(self, response: httpx.Response) -> FabricError:
        kind = response.headers.get("content-type", "no content type").partition(";")[0]
        reason = f"it answered {response.status_code} with {kind}, which a hub does not"
        return HubUnreachable(url=self._base_url, reason=reason)

    @staticmethod
    def _check_url(base_url: str) -> httpx.URL:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise SettingInvalid(
                setting="client.base_url", value=base_url, reason=str(error)
            ) from error
        if url.scheme not in ("http", "https") or not url.host:
            raise SettingInvalid(
                setting="client.base_url",
                value=base_url,
                reason="it must be an address such as http://127.0.0.1:8642",
            )
        return url


def read_error(reply: Mapping[str, Any]) -> FabricError:
    """Return the error in an OpenAI-shaped reply, in the class its code belongs to.

    Raises:
        KeyError, TypeError: The reply is not of that shape.
    """
    error = reply["error"]
    detail = dict(error.get("detail") or {}) if isinstance(error, dict) else {}
    if error["param"]:
        detail.setdefault("param", error["param"])
    return FabricError.rebuild(error["code"], error["message"], detail)


def _retry_delay_s(error: FabricError) -> float:
    asked_for = error.detail.get("retry_after_s")
    delay_s = float(asked_for) if isinstance(asked_for, int | float) else RETRY_DELAY_S
    # Clients that were turned away together should not come back together.
    return delay_s * (1.0 + 0.25 * random.random())  # noqa: S311


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S:g} s"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        cause = cause.__cause__ or cause.__context__
    return str(error).rstrip(".") or type(error).__name__
