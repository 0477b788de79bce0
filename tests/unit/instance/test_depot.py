"""What programs move past sessions: constants an instance fetches, results it leaves."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from fabric.errors import NotFound, PermissionDenied, ProgramInvalid, SessionLost
from fabric.instance.depot import Depot, constants_elsewhere
from fabric.instance.direct import direct_route
from fabric.instance.serve import serve_session
from fabric.messages import (
    EMBED_SAMPLING,
    Cancel,
    Credit,
    Event,
    Failed,
    Finished,
    Heartbeat,
    Hello,
    ProgramInput,
    Request,
    Saves,
    Task,
    Welcome,
    parse_from_instance,
)
from fabric.messages.wire import Wire
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.fixed_programs import zeros

DATA = zeros({"w": ("F32", (8,))})
ARTIFACT = "art_" + "5" * 32


def make_task(*, window: int = 256, **constants: Any) -> Task:
    declared = {
        "sha256": hashlib.sha256(DATA).hexdigest(),
        "size": len(DATA),
        "handle": {"artifact": ARTIFACT},
    }
    nodes = [{"op": "const", "name": "w"}, {"op": "save", "name": "h", "x": 0}]
    program = {
        "runs": [{"id": "a", "ids": [1], "nodes": nodes}],
        "consts": {**declared, **constants},
    }
    asked = ProgramInput.model_validate({"program": program})
    request = Request(mode="program", model="fixed", input=asked, sampling=EMBED_SAMPLING)
    digest = "sha256:" + "0" * 64
    return Task(
        id=request.id, attempt=1, request=request, digest=digest, deadline_s=60.0, window=window
    )


class Shelf:
    """The hub's route of artifacts, as one instance's token opens it."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict[str, str]] = []
        self.given = DATA
        self.left: list[bytes] = []
        self.status = 200
        self.body = b""
        self.open = asyncio.Event()
        self.open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        verb, target, _ = head[0].split(" ")
        path, _, query = target.partition("?")
        fields = dict(pair.split("=") for pair in query.split("&"))
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
        self.asked.append({"verb": verb, "path": path, "token": headers["authorization"], **fields})
        if verb == "PUT":
            self.left.append(b"")
            while size := int(await reader.readline(), 16):
                self.left[-1] += await reader.readexactly(size)
                await reader.readline()
        await self.open.wait()
        body = self.body or (self.given if verb == "GET" else b"{}")
        reply = f"HTTP/1.1 {self.status} X\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{reply}connection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()


@pytest.fixture
async def shelf() -> AsyncIterator[Shelf]:
    shelf = Shelf()
    server = await asyncio.start_server(shelf.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    shelf.url = f"ws://{host}:{port}/hub/v1/fabric/session"
    yield shelf
    shelf.open.set()
    server.close()
    await server.wait_closed()


@pytest.fixture
def depot(shelf: Shelf) -> Depot:
    return Depot(shelf.url, "fabl_secret", instance="i")


async def test_constants_are_fetched_for_their_run(depot: Depot, shelf: Shelf) -> None:
    task = make_task()
    filled = await depot.fill(task)
    assert constants_elsewhere(filled) is None
    constants = filled.request.input.program.consts  # type: ignore[union-attr]
    assert base64.b64decode(constants.data) == DATA
    assert shelf.asked == [
        {
            "verb": "GET",
            "path": "/hub/v1/fabric/instance/artifacts",
            "token": "Bearer fabl_secret",
            "artifact": ARTIFACT,
            "run": task.id,
        }
    ]
    assert await depot.fill(filled) is filled


@pytest.mark.parametrize("given", [DATA[:-1] + b"x", DATA[:-1], DATA + b"x" * 2**20])
async def test_constants_that_are_others_are_refused(
    depot: Depot, shelf: Shelf, given: bytes
) -> None:
    shelf.given = given
    with pytest.raises(ProgramInvalid):
        await depot.fill(make_task())


async def test_a_foreign_handle_is_followed_nowhere(depot: Depot, shelf: Shelf) -> None:
    with pytest.raises(ProgramInvalid):
        await depot.fill(make_task(handle={"url": "http://169.254.169.254/"}))
    assert shelf.asked == []


async def test_a_result_is_left_once(depot: Depot, shelf: Shelf) -> None:
    data = b"r" * (2**20 + 1)
    handle = depot.keep(data)
    saves = Saves(task_id="run_1", attempt=1, run="a", names=("h",), size=len(data), handle=handle)
    assert depot.has(saves)
    await depot.leave(saves)
    assert not depot.has(saves)
    assert shelf.left == [data]
    assert (shelf.asked[0]["artifact"], shelf.asked[0]["part"]) == (handle["artifact"], "a")


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, b'{"error": {"code": "not_found", "message": "There is none."}}', NotFound),
        (403, b'{"error": {"code": "permission_denied", "message": "No."}}', PermissionDenied),
    ],
)
async def test_the_hubs_refusals_are_told_as_they_are(
    depot: Depot, shelf: Shelf, status: int, body: bytes, error: type[Exception]
) -> None:
    shelf.status, shelf.body = status, body
    with pytest.raises(error):
        await depot.fill(make_task())


async def test_a_hub_that_is_gone_is_a_lost_session() -> None:
    with pytest.raises(SessionLost):
        await Depot("ws://127.0.0.1:9/v1/fabric/session", "x", instance="i").fill(make_task())


# ---- through a session ---------------------------------------------------------------------------


class Client:
    """A hub that sends exactly what it is told."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self._lines: list[str] = []

    async def send(self, frame: Wire) -> None:
        await self._websocket.send(frame.model_dump_json())

    async def receive(self, timeout_s: float = 20.0) -> Any:
        """Return the next frame that is not a heartbeat."""
        while True:
            if not self._lines:
                async with asyncio.timeout(timeout_s):
                    self._lines = str(await self._websocket.recv()).split("\n")
            frame = parse_from_instance(self._lines.pop(0))
            if not isinstance(frame, Heartbeat):
                return frame

    async def rest(self) -> list[Event]:
        """Return the frames of a task up to its last."""
        events: list[Event] = []
        while not (events and isinstance(events[-1], Finished | Failed)):
            events.append(await self.receive())
        return events


@asynccontextmanager
async def session(depot: Depot | None, *, inline_bytes: int = 0) -> AsyncIterator[Client]:
    """Yield a client of an instance whose engine keeps results over ``inline_bytes``."""
    keep = None if depot is None else depot.keep
    engine = FixedDelayEngine(keep=keep, inline_bytes=inline_bytes)
    engine.start()
    info = engine.info
    hello = Hello(
        instance="i",
        site="alpha",
        model="fixed",
        digest=info.digest,
        limits=info.limits,
        dtype=info.dtype,
        engine=info.engine,
        points=info.points,
    )
    drain = asyncio.Event()
    route = direct_route(
        lambda socket, peer: serve_session(socket, engine, hello, drain, peer=peer, depot=depot),
        token="secret",
    )
    try:
        async with route as url:
            headers = {"Authorization": "Bearer secret"}
            async with connect(url, additional_headers=headers, close_timeout=0.5) as websocket:
                client = Client(websocket)
                assert (await client.receive()).points == info.points
                await client.send(Welcome(session="s", heartbeat_s=60.0))
                yield client
    finally:
        engine.close()


async def test_a_session_fetches_constants_and_leaves_results_before_it_names_them(
    depot: Depot, shelf: Shelf
) -> None:
    async with session(depot) as client:
        await client.send(make_task())
        events = await client.rest()
    assert [event.type for event in events] == ["accepted", "saves", "finished"]
    assert events[1].handle == {"artifact": shelf.asked[1]["artifact"]}  # type: ignore[union-attr]
    assert [one["verb"] for one in shelf.asked] == ["GET", "PUT"]
    assert len(shelf.left[0]) == events[1].size  # type: ignore[union-attr]


async def test_a_result_the_hub_does_not_take_fails_its_task_alone(
    depot: Depot, shelf: Shelf
) -> None:
    task = make_task()
    async with session(depot) as client:
        task = await depot.fill(task)
        shelf.status = 413
        shelf.body = b'{"error": {"code": "artifacts_full", "message": "It is full."}}'
        await client.send(task)
        events = await client.rest()
        assert [event.type for event in events] == ["accepted", "failed"]
        assert events[-1].failure.code == "artifacts_full"  # type: ignore[union-attr]
        shelf.status, shelf.body = 200, b""
        await client.send(make_task())
        assert isinstance((await client.rest())[-1], Finished)


@pytest.mark.parametrize("where", ["fetching", "leaving"])
async def test_a_task_is_cancelled_while_the_hub_is_slow(
    depot: Depot, shelf: Shelf, where: str
) -> None:
    task = make_task()
    async with session(depot) as client:
        if where == "leaving":
            task = await depot.fill(task)
        num_asked = len(shelf.asked)
        shelf.open.clear()
        await client.send(task)
        async with asyncio.timeout(20):
            while len(shelf.asked) == num_asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await client.send(Cancel(task_id=task.id, attempt=1))
        last = (await client.rest())[-1]
        assert isinstance(last, Failed | Finished)
        if where == "fetching":
            assert isinstance(last, Failed)
            assert last.failure.code == "request_cancelled"


async def test_an_instance_without_a_way_to_the_hub_takes_inline_constants_alone() -> None:
    async with session(None, inline_bytes=2**20) as client:
        await client.send(make_task())
        (failed,) = await client.rest()
        assert failed.failure.code == "program_too_large"  # type: ignore[union-attr]
        inline = {"data": base64.b64encode(DATA).decode(), "handle": None}
        await client.send(make_task(**inline))
        assert isinstance((await client.rest())[-1], Finished)


async def test_saves_wait_for_credit_as_tokens_do() -> None:
    task = make_task(window=1, data=base64.b64encode(DATA).decode(), handle=None)
    program = task.request.input.program  # type: ignore[union-attr]
    two = program.model_copy(
        update={"runs": tuple(program.runs[0].model_copy(update={"id": name}) for name in "ab")}
    )
    request = task.request.model_copy(update={"input": ProgramInput(program=two)})
    async with session(None, inline_bytes=2**20) as client:
        await client.send(task.model_copy(update={"request": request}))
        assert [(await client.receive()).type for _ in range(2)] == ["accepted", "saves"]
        with pytest.raises(TimeoutError):
            await client.receive(timeout_s=0.3)
        await client.send(Credit(task_id=task.id, attempt=1, num_events=1))
        assert [event.type for event in await client.rest()] == ["saves", "finished"]
