"""How replies reach the socket."""

import asyncio

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from fabric.gateway import get_server_config
from fabric.testing.hub import eventually

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}


class Wire(asyncio.Transport):
    """A transport that keeps what is written, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""


async def ask(app: ASGIApp, *requests: bytes) -> Wire:
    """Return a connection to a served app on which requests were sent."""
    config = get_server_config(app, host="127.0.0.1", port=0)
    config.load()
    wire = Wire()
    protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[call-arg]
    protocol.connection_made(wire)
    protocol.data_received(b"".join(requests))  # type: ignore[attr-defined]
    return wire


def request(path: str, *headers: bytes) -> bytes:
    return b"\r\n".join((f"GET {path} HTTP/1.1".encode(), b"host: hub", *headers, b"", b""))


async def whole(scope: Scope, _receive: Receive, send: Send) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": scope["path"][1:].encode()})


def waiting_for(event: asyncio.Event) -> ASGIApp:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(START)
        await event.wait()
        await send({"type": "http.response.body", "body": b"abcd"})

    return app


def test_a_whole_reply_is_one_piece() -> None:
    async def run() -> None:
        wire = await ask(whole, request("/abcd"), request("/efgh", b"connection: close"))
        await eventually(lambda: wire.closed)
        assert [piece.partition(b"\r\n\r\n")[2] for piece in wire.pieces] == [b"abcd", b"efgh"]
        assert all(piece.startswith(b"HTTP/1.1 200 OK\r\n") for piece in wire.pieces)

    asyncio.run(run())


def test_a_head_does_not_wait_for_a_late_body() -> None:
    async def run() -> None:
        event = asyncio.Event()
        wire = await ask(waiting_for(event), request("/"))
        await eventually(lambda: bool(wire.pieces))
        assert wire.pieces[0].endswith(b"\r\n\r\n")
        event.set()
        await eventually(lambda: len(wire.pieces) > 1)
        assert wire.pieces[1:] == [b"abcd"]

    asyncio.run(run())


@pytest.mark.parametrize("text", [b"HTTP/1.1 200 OK", b"HTTP/1.1 "])
def test_a_body_that_looks_like_a_head_arrives_whole_and_in_order(text: bytes) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        length = str(3 * len(text)).encode()
        await send({**START, "headers": [(b"content-length", length)]})
        for is_last in (False, False, True):
            await send({"type": "http.response.body", "body": text, "more_body": not is_last})

    async def run() -> None:
        wire = await ask(app, request("/", b"connection: close"))
        await eventually(lambda: wire.closed)
        assert b"".join(wire.pieces).partition(b"\r\n\r\n")[2] == 3 * text

    asyncio.run(run())
