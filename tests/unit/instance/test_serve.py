"""The instance's side of a session, spoken to frame by frame."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_blocking

from fabric.instance.direct import direct_route
from fabric.instance.serve import serve_session
from fabric.messages import (
    EMBED_SAMPLING,
    Cancel,
    Credit,
    Drain,
    FromInstance,
    Heartbeat,
    Hello,
    Limits,
    Request,
    Sampling,
    Task,
    TextInput,
    Welcome,
    parse_from_instance,
)
from fabric.messages.wire import Wire
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.patience import within

WELCOME = Welcome(session="s", heartbeat_s=60.0)


class Client:
    """A hub that sends exactly what it is told."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self._lines: list[str] = []

    async def send(self, *frames: Wire | str) -> None:
        texts = [frame if isinstance(frame, str) else frame.model_dump_json() for frame in frames]
        await self.websocket.send("\n".join(texts))

    async def receive(self, timeout_s: float = 20.0) -> FromInstance:
        """Return the next frame that is not a heartbeat."""
        while True:
            if not self._lines:
                message = await within(self.websocket.recv(), timeout_s)
                self._lines = message.split("\n")
            frame = parse_from_instance(self._lines.pop(0))
            if not isinstance(frame, Heartbeat):
                return frame

    async def receive_types(self, number: int) -> list[str]:
        return [(await self.receive()).type for _ in range(number)]


class Instance:
    def __init__(self, url: str, engine: FixedDelayEngine, drain: asyncio.Event) -> None:
        self.url = url
        self.engine = engine
        self.drain = drain

    @asynccontextmanager
    async def connect(self, *, welcome: bool = True) -> AsyncIterator[Client]:
        headers = {"Authorization": "Bearer secret"}
        async with connect(
            self.url, additional_headers=headers, compression=None, close_timeout=0.5
        ) as websocket:
            client = Client(websocket)
            assert isinstance(await client.receive(), Hello)
            if welcome:
                await client.send(WELCOME)
            yield client

    async def wait_rows(self, number: int) -> None:
        async with asyncio.timeout(5):
            while self.engine.load().num_running != number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
async def instance(request: pytest.FixtureRequest) -> AsyncIterator[Instance]:
    """An instance on its direct route; a parameter is the engine's limits."""
    engine = FixedDelayEngine(token_s=0.01, limits=getattr(request, "param", None))
    engine.start()
    hello = Hello(
        instance="instance-1",
        site="alpha",
        model="fixed",
        digest=engine.info.digest,
        limits=engine.info.limits,
        dtype="float32",
        engine="fixed-delay",
    )
    drain = asyncio.Event()
    async with direct_route(
        lambda websocket, peer: serve_session(websocket, engine, hello, drain, peer=peer),
        token="secret",
    ) as url:
        yield Instance(url, engine, drain)
    engine.close()


def make_task(number: int = 1, *, max_tokens: int = 10, window: int = 256, **sampling) -> Task:
    request = Request(
        id=f"run_{number}",
        model="fixed",
        input=TextInput(text="hello"),
        sampling=Sampling(max_tokens=max_tokens, **sampling),
    )
    return Task(
        id=request.id,
        attempt=1,
        request=request,
        digest=FixedDelayEngine().info.digest,
        deadline_s=60,
        window=window,
    )


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
async def test_direct_route_answers_401_without_its_token(instance, headers) -> None:
    with pytest.raises(InvalidStatus) as refusal:
        await connect(instance.url, additional_headers=headers)
    assert refusal.value.response.status_code == 401


def make_embed_task() -> Task:
    task = make_task()
    request = Request(
        id=task.id, mode="embed", model="fixed", input=task.request.input, sampling=EMBED_SAMPLING
    )
    return task.model_copy(update={"request": request})


async def test_a_vector_needs_no_credit(instance) -> None:
    async with instance.connect() as client:
        await client.send(make_embed_task().model_copy(update={"window": 1}))
        assert await client.receive_types(3) == ["accepted", "embedding", "finished"]


@pytest.mark.parametrize(
    "instance", [Limits(context_tokens=64, max_rows=2, cache_tokens=128)], indirect=True
)
async def test_a_mode_that_the_engine_has_not_is_refused(instance) -> None:
    async with instance.connect() as client:
        await client.send(make_embed_task())
        failed = await client.receive()
        assert (failed.type, failed.failure.detail["param"]) == ("failed", "mode")
        await client.send(make_task(2, max_tokens=1))
        assert await client.receive_types(3) == ["accepted", "token", "finished"]


async def test_no_more_tokens_are_sent_than_there_is_credit_for(instance) -> None:
    async with instance.connect() as client:
        await client.send(make_task(max_tokens=10, window=3))
        assert await client.receive_types(4) == ["accepted", "token", "token", "token"]
        await instance.wait_rows(0)
        with pytest.raises(TimeoutError):
            await client.receive(timeout_s=0.1)
        await client.send(Credit(task_id="run_1", attempt=1, num_events=2))
        assert await client.receive_types(2) == ["token", "token"]
        with pytest.raises(TimeoutError):
            await client.receive(timeout_s=0.1)
        await client.send(Credit(task_id="run_1", attempt=1, num_events=100))
        assert await client.receive_types(6) == ["token"] * 5 + ["finished"]


async def test_cancel_ends_a_task_whose_tokens_wait_for_credit(instance) -> None:
    async with instance.connect() as client:
        await client.send(make_task(max_tokens=1000, window=1))
        assert await client.receive_types(2) == ["accepted", "token"]
        await client.send(Cancel(task_id="run_1", attempt=1))
        failed = await client.receive()
        assert failed.failure.code == "request_cancelled"
        await instance.wait_rows(0)


async def test_lost_connection_cancels_its_tasks_and_no_others(instance) -> None:
    async with instance.connect() as staying:
        await staying.send(make_task(1, max_tokens=1000))
        async with instance.connect() as leaving:
            await leaving.send(make_task(2, max_tokens=1000), make_task(3, max_tokens=1000, n=2))
            await instance.wait_rows(4)
        await instance.wait_rows(1)
        assert await staying.receive_types(3) == ["accepted", "token", "token"]


async def test_task_sent_twice_runs_once(instance) -> None:
    async with instance.connect() as client:
        await client.send(make_task(max_tokens=3), make_task(max_tokens=3))
        assert await client.receive_types(5) == ["accepted"] + ["token"] * 3 + ["finished"]
        with pytest.raises(TimeoutError):
            await client.receive(timeout_s=0.1)


async def test_task_may_be_cancelled_by_another_session(instance) -> None:
    async with instance.connect() as client:
        await client.send(make_task(max_tokens=1000))
        await instance.wait_rows(1)
        async with instance.connect() as other:
            await other.send(Cancel(task_id="run_1", attempt=1))
        await instance.wait_rows(0)


@pytest.mark.parametrize(
    "broken",
    [
        "no json",
        "",
        '{"type": "task"}',
        '{"type": "hello"}',
        json.dumps({**json.loads(make_task().model_dump_json()), "extra": 1}),
        make_task().model_dump_json().replace('"max_tokens":10', '"max_tokens":-1'),
        WELCOME.model_dump_json(),
        b"\x00\xff",
        "[" * 100_000,
    ],
    ids=[
        "no-json",
        "empty",
        "half-a-task",
        "frame-of-an-instance",
        "unknown-field",
        "negative-max-tokens",
        "second-welcome",
        "binary",
        "nested",
    ],
)
async def test_malformed_frame_closes_its_session_with_1002_and_no_other(instance, broken) -> None:
    async with instance.connect() as bystander, instance.connect() as client:
        await bystander.send(make_task(1, max_tokens=20))
        await client.websocket.send(broken)
        await client.websocket.wait_closed()
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
        assert closed.value.rcvd.code == 1002
        assert "session protocol" in closed.value.rcvd.reason
        assert (await bystander.receive_types(22))[-1] == "finished"


async def test_message_over_the_cap_closes_the_session_with_1009(instance) -> None:
    def send_too_much() -> int:
        headers = {"Authorization": "Bearer secret"}
        with connect_blocking(instance.url, additional_headers=headers) as websocket:
            websocket.recv()
            with suppress(ConnectionClosed):
                websocket.send("x" * (16 * 2**20 + 1))
            with pytest.raises(ConnectionClosed) as closed:
                websocket.recv()
            return closed.value.rcvd.code

    assert await asyncio.to_thread(send_too_much) == 1009


async def test_reader_that_stalls_and_leaves_harms_nobody(instance, caplog) -> None:
    async with instance.connect() as bystander:
        for _ in range(3):
            async with instance.connect() as client:
                await client.send(*(make_task(i, max_tokens=2000, window=2000) for i in range(50)))
                await instance.wait_rows(50)
                client.websocket.transport.pause_reading()
                await asyncio.wait([asyncio.create_task(instance.wait_rows(0))], timeout=0.2)
                client.websocket.transport.resume_reading()
                await client.send("not a frame")
            await instance.wait_rows(0)
        await bystander.send(make_task(max_tokens=2))
        assert await bystander.receive_types(4) == ["accepted", "token", "token", "finished"]
    assert "handler failed" not in caplog.text


async def test_first_frame_other_than_welcome_is_a_violation(instance) -> None:
    async with instance.connect(welcome=False) as client:
        await client.send(make_task())
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
        assert closed.value.rcvd.code == 1002
    await instance.wait_rows(0)


async def test_drain_lets_tasks_finish_refuses_new_ones_and_says_goodbye(instance) -> None:
    async with instance.connect() as client, instance.connect() as other:
        await client.send(make_task(1, max_tokens=20))
        await instance.wait_rows(1)
        await other.send(Drain(reason="maintenance"))
        assert (await other.receive()).reason == "drained"
        await client.send(make_task(2))
        frames = [await client.receive() for _ in range(23)]
        refused = next(frame for frame in frames if frame.type == "failed")
        assert (refused.task_id, refused.failure.code) == ("run_2", "engine_stopped")
        assert [frame.type for frame in frames if frame.type != "failed"] == [
            "accepted",
            *["token"] * 20,
            "finished",
        ]
        assert (await client.receive()).reason == "drained"
        with pytest.raises(ConnectionClosed) as closed:
            await client.receive()
        assert closed.value.rcvd.code == 1000


async def test_answer_that_fits_no_frame_fails_alone(instance, monkeypatch) -> None:
    monkeypatch.setattr("fabric.instance.serve.MAX_FRAME_BYTES", 1000)
    async with instance.connect() as client:
        text = TextInput(text="word " * 100)
        task = make_task(prompt_logprobs=True)
        big = task.model_copy(update={"request": task.request.model_copy(update={"input": text})})
        await client.send(big)
        assert (await client.receive()).type == "accepted"
        assert (await client.receive()).failure.code == "payload_error"
        await client.send(make_task(2, max_tokens=1))
        assert await client.receive_types(3) == ["accepted", "token", "finished"]


async def test_instance_whose_engine_has_stopped_leaves(instance) -> None:
    async with instance.connect() as client:
        await asyncio.to_thread(instance.engine.close)
        await client.send(make_task())
        assert (await client.receive()).failure.code == "engine_stopped"
        assert (await client.receive()).reason == "drained"
