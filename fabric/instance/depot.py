"""An instance's way to the artifacts of its hub: constants it fetches, large results it leaves.

The engine's thread hands results over with ``keep``, which never waits; a session sends them to
the hub before it passes on the event that names them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import ssl
import threading
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx

from fabric.errors import FabricError, ProgramInvalid, ProgramTooLarge, SessionLost
from fabric.messages import ProgramInput, Saves, Task
from fabric.messages.program import MAX_INLINE_BYTES, Constants

TIMEOUT_S = 60.0
PIECE_BYTES = 2**20

Handle = dict[str, object]


class Depot:
    """What programs of one instance move past its sessions.

    Args:
        session_url: The hub's session route, which the instance dials.
        token: Its launch token.
        instance: Its name, for errors.
    """

    def __init__(self, session_url: str, token: str, *, instance: str) -> None:
        parts = urlsplit(session_url)
        path = parts.path.removesuffix("/session") + "/instance/artifacts"
        self._url = f"{parts.scheme.replace('ws', 'http', 1)}://{parts.netloc}{path}"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._instance = instance
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._kept: dict[str, bytes] = {}

    def keep(self, data: bytes) -> Handle:
        """Take a result and return its handle at once. Called on any thread."""
        name = f"art_{secrets.token_hex(16)}"
        with self._lock:
            self._kept[name] = data
        return {"artifact": name}

    def has(self, saves: Saves) -> bool:
        """Whether what an event names is still here."""
        return saves.handle is not None and saves.handle.get("artifact") in self._kept

    def drop(self, saves: Saves) -> None:
        """Forget a result that nobody waits for."""
        self._take(saves)

    async def leave(self, saves: Saves) -> None:
        """Send the hub the result that an event names.

        Raises:
            FabricError: The hub did not take it.
        """
        name, data = self._take(saves)
        query = {"artifact": name, "run": saves.task_id, "part": saves.run}
        async with await self._open() as http:
            try:
                reply = await http.put(self._url, params=query, content=_pieces(data))
            except httpx.HTTPError as error:
                raise self._lost(error) from error
        _check(reply)

    async def fill(self, task: Task) -> Task:
        """Return a task whose program has its constants inline.

        Raises:
            ProgramInvalid: They are not what the program declares.
            FabricError: The hub did not give them.
        """
        if (constants := constants_elsewhere(task)) is None:
            return task
        match constants.handle:
            case {"artifact": str(name), **rest} if not rest:
                query = {"artifact": name, "run": task.id}
            case _:
                raise ProgramInvalid(reason="the handle of its constants is not an artifact's")
        async with await self._open() as http:
            try:
                data = await self._get(http, query, constants.size)
            except httpx.HTTPError as error:
                raise self._lost(error) from error
        actual = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if (len(data), actual) != (constants.size, constants.sha256):
            reason = f"its constants have {len(data)} bytes and the sha256 {actual} at the hub"
            raise ProgramInvalid(reason=reason)
        inline = constants.model_copy(
            update={"data": base64.b64encode(data).decode(), "handle": None}
        )
        return _with_constants(task, inline)

    async def _get(self, http: httpx.AsyncClient, query: dict[str, str], limit: int) -> bytes:
        data = bytearray()
        async with http.stream("GET", self._url, params=query) as reply:
            if reply.is_error:
                await reply.aread()
            _check(reply)
            async for piece in reply.aiter_bytes():
                data += piece
                if len(data) > limit:
                    raise ProgramInvalid(reason=f"its constants have over {limit} bytes at the hub")
        return bytes(data)

    def _take(self, saves: Saves) -> tuple[str, bytes]:
        name = str((saves.handle or {}).get("artifact"))
        with self._lock:
            return name, self._kept.pop(name, b"")

    async def _open(self) -> httpx.AsyncClient:
        if self._tls is None:
            # Reading the system's certificates takes a tenth of a second: not on the loop.
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        return httpx.AsyncClient(headers=self._headers, timeout=TIMEOUT_S, verify=self._tls)

    def _lost(self, error: httpx.HTTPError) -> SessionLost:
        reason = f"the hub did not serve its artifacts ({type(error).__name__})"
        return SessionLost(instance=self._instance, reason=reason)


def constants_elsewhere(task: Task) -> Constants | None:
    """Return the constants of a task's program if they are not with it."""
    asked = task.request.input
    if not isinstance(asked, ProgramInput) or asked.program.consts is None:
        return None
    return asked.program.consts if asked.program.consts.data is None else None


def out_of_reach(constants: Constants) -> ProgramTooLarge:
    """Return why an instance without a way to the hub cannot have constants."""
    return ProgramTooLarge(
        cap="constants at an instance that cannot reach the hub, in bytes,",
        value=constants.size,
        limit=MAX_INLINE_BYTES,
    )


def _with_constants(task: Task, constants: Constants) -> Task:
    asked = task.request.input
    assert isinstance(asked, ProgramInput)
    program = asked.program.model_copy(update={"consts": constants})
    request = task.request.model_copy(update={"input": ProgramInput(program=program)})
    return task.model_copy(update={"request": request})


def _check(reply: httpx.Response) -> None:
    if not reply.is_error:
        return
    try:
        error = reply.json()["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = FabricError.code, f"The hub answered {reply.status_code}; try again later."
    raise FabricError.rebuild(code, message, {})


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]
