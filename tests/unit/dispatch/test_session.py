"""The hub's side of a session, against a peer that says what the test tells it to."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fabric.dispatch import session as session_module
from fabric.dispatch.session import ConnectionLost, SessionChannel
from fabric.errors import ProtocolViolation, SessionLost, TicketInvalid
from fabric.messages import (
    Accepted,
    Cancel,
    Credit,
    Event,
    Failure,
    Finished,
    FromHub,
    Goodbye,
    Heartbeat,
    Hello,
    InstanceState,
    Limits,
    Load,
    Metered,
    Redeem,
    Redeemed,
    Request,
    Sampling,
    Settled,
    Task,
    TextInput,
    Token,
    Usage,
    Welcome,
    parse_from_hub,
)
from fabric.messages.wire import Wire
from fabric.testing.patience import within

HELLO = Hello(
    instance="instance-1",
    site="alpha",
    model="fixed",
    digest="sha256:0",
    limits=Limits(context_tokens=100, max_rows=4, cache_tokens=400),
    dtype="float32",
    engine="scripted",
)


class ScriptedPeer:
    """A ``Connection`` whose other end is the test."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[str | None] = asyncio.Queue()
        self._heard: asyncio.Queue[str] = asyncio.Queue()
        self.closed_with: tuple[int, str] | None = None

    def say(self, *frames: Wire | str) -> None:
        texts = [frame if isinstance(frame, str) else frame.model_dump_json() for frame in frames]
        self._said.put_nowait("\n".join(texts))

    def hang_up(self) -> None:
        self._said.put_nowait(None)

    async def hear(self) -> FromHub:
        return parse_from_hub(await within(self._heard.get()))

    async def send(self, text: str) -> None:
        self._heard.put_nowait(text)

    async def receive(self) -> str:
        text = await self._said.get()
        if text is None:
            raise ConnectionLost("the peer hung up")
        return text

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self.closed_with = self.closed_with or (code, reason)


def make_task(number: int = 1, *, window: int = 4, attempt: int = 1) -> Task:
    request = Request(
        id=f"run_{number}",
        model="fixed",
        input=TextInput(text="hello"),
        sampling=Sampling(max_tokens=50),
    )
    return Task(
        id=request.id,
        attempt=attempt,
        request=request,
        digest=HELLO.digest,
        deadline_s=60,
        window=window,
    )


def accepted(task: Task) -> Accepted:
    return Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=1)


def token(task: Task, position: int, text: str = "x") -> Token:
    return Token(
        task_id=task.id,
        attempt=task.attempt,
        choice=0,
        position=position,
        token_id=position,
        text=text,
    )


def finished(task: Task) -> Finished:
    return Finished(task_id=task.id, attempt=task.attempt, finish_reasons=("stop",), usage=Usage())


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


@pytest.fixture
async def peer() -> ScriptedPeer:
    return ScriptedPeer()


@pytest.fixture
async def channel(peer: ScriptedPeer) -> AsyncIterator[SessionChannel]:
    peer.say(HELLO)
    channel = await SessionChannel.open(peer, heartbeat_s=60)
    await channel.welcome()
    assert isinstance(await peer.hear(), Welcome)
    yield channel
    await channel.close()


async def start(peer: ScriptedPeer, channel: SessionChannel, task: Task) -> asyncio.Task:
    """Start a run and return once the peer has its task."""
    run = asyncio.create_task(collect(channel.run(task)))
    assert await peer.hear() == task
    return run


async def test_hello_is_known_before_the_session_is_accepted(peer) -> None:
    peer.say(HELLO)
    channel = await SessionChannel.open(peer)
    assert channel.hello == HELLO
    assert peer._heard.empty(), "nothing is said before the caller has looked at the hello"
    await channel.close("another digest", code=4409)
    assert peer.closed_with == (4409, "another digest")


@pytest.mark.parametrize(
    "first",
    [HELLO.model_copy(update={"protocol": 99}), Goodbye(reason="x"), "no json", "{}"],
    ids=["other-version", "no-hello", "no-json", "no-frame"],
)
async def test_peer_that_starts_wrong_is_closed_with_1002(peer, first) -> None:
    peer.say(first)
    with pytest.raises(ProtocolViolation):
        await SessionChannel.open(peer)
    assert peer.closed_with[0] == 1002


async def test_peer_that_says_nothing_is_given_up(peer, monkeypatch) -> None:
    monkeypatch.setattr(session_module, "HELLO_TIMEOUT_S", 0.05)
    with pytest.raises(SessionLost, match="in time"):
        await SessionChannel.open(peer)
    assert peer.closed_with[0] == 1008


async def test_late_and_repeated_events_are_ignored(peer, channel) -> None:
    task = make_task()
    run = await start(peer, channel, task)
    peer.say(accepted(task), token(task, 0), finished(task))
    peer.say(finished(task), token(task, 1))
    peer.say(token(make_task(attempt=7), 0))
    assert [event.type for event in await run] == ["accepted", "token", "finished"]
    other = make_task(2)
    run = await start(peer, channel, other)
    peer.say(finished(task), accepted(other), finished(other))
    assert [event.type for event in await run] == ["accepted", "finished"]
    assert channel.num_stray_events == 4


async def test_credit_follows_the_reader(peer, channel) -> None:
    task = make_task(window=4)
    events = channel.run(task)
    first = asyncio.create_task(anext(events))
    await peer.hear()
    peer.say(accepted(task), *(token(task, position) for position in range(4)))
    await first
    await anext(events)
    with pytest.raises(TimeoutError):
        await within(peer._heard.get(), 0.05)
    await anext(events)
    assert await peer.hear() == Credit(task_id=task.id, attempt=1, num_events=2)
    await events.aclose()
    assert await peer.hear() == Cancel(task_id=task.id, attempt=1)


@pytest.mark.parametrize(
    "say",
    [
        lambda task: [accepted(task), *(token(task, position) for position in range(5))],
        lambda task: [token(task, 0)],
        lambda task: [accepted(task), accepted(task)],
        lambda task: [finished(task)],
        lambda task: [accepted(task), token(task, 0, text="x" * 2**16)],
        lambda task: [HELLO],
        lambda task: ['{"type": "token"}'],
        lambda task: [""],
        lambda task: ["[" * 100_000],
    ],
    ids=[
        "beyond-its-window",
        "token-first",
        "accepted-twice",
        "finished-first",
        "giant-token",
        "second-hello",
        "half-a-frame",
        "empty",
        "nested",
    ],
)
async def test_peer_that_breaks_the_protocol_is_closed_with_1002(peer, channel, say) -> None:
    task, bystander = make_task(1, window=4), make_task(2)
    runs = [await start(peer, channel, one) for one in (task, bystander)]
    peer.say(*say(task))
    outcomes = await within(asyncio.gather(*runs, return_exceptions=True))
    assert isinstance(outcomes[0], ProtocolViolation | SessionLost)
    assert isinstance(outcomes[1], SessionLost), "another task may be sent again elsewhere"
    await channel.close()
    assert peer.closed_with[0] == 1002
    assert len(peer.closed_with[1].encode()) <= 123


async def test_silence_for_three_heartbeats_ends_the_session(peer) -> None:
    peer.say(HELLO)
    channel = await SessionChannel.open(peer, heartbeat_s=0.05)
    await channel.welcome()
    await peer.hear()
    run = await start(peer, channel, make_task())
    with pytest.raises(SessionLost, match="nothing was heard"):
        await within(run)
    await channel.close()


async def test_heartbeats_keep_the_session_and_tell_load_and_drain(peer) -> None:
    peer.say(HELLO)
    channel = await SessionChannel.open(peer, heartbeat_s=0.1)
    await channel.welcome()
    closed = asyncio.create_task(channel.wait_closed())
    for num_running in range(10):
        peer.say(Heartbeat(state=InstanceState.READY, load=Load(num_running=num_running)))
        await asyncio.wait([closed], timeout=0.05)
    assert not closed.done()
    assert channel.load.num_running == 9
    assert not channel.draining
    peer.say(Heartbeat(state=InstanceState.DRAINING, load=Load()))
    peer.say(Goodbye(reason="drained"))
    assert await within(closed) == "drained"
    assert channel.draining
    await channel.close()


async def test_what_was_said_before_the_end_is_delivered(peer, channel) -> None:
    done, cut = make_task(1), make_task(2)
    runs = [await start(peer, channel, task) for task in (done, cut)]
    peer.say(accepted(done), finished(done), accepted(cut), token(cut, 0))
    peer.hang_up()
    assert len(await runs[0]) == 2
    with pytest.raises(SessionLost, match="hung up"):
        await runs[1]
    assert await channel.wait_closed() == "the peer hung up"


async def test_one_attempt_is_not_sent_twice_at_once(peer, channel) -> None:
    task = make_task()
    run = await start(peer, channel, task)
    with pytest.raises(ProtocolViolation):
        await collect(channel.run(task))
    peer.say(accepted(task), finished(task))
    assert len(await run) == 2, "the first run goes on"


class HeldTill:
    """A till that admits when it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.settled: list[Metered] = []
        self.refuse = False

    async def redeem(self, frame: Redeem) -> Redeemed:
        await self.open.wait()
        failure = Failure.of(TicketInvalid()) if self.refuse else None
        return Redeemed(task_id=frame.task_id, attempt=frame.attempt, failure=failure)

    async def settle(self, frame: Metered) -> Settled | None:
        self.settled.append(frame)
        return None


def redeem() -> Redeem:
    task = make_task()
    return Redeem(task_id=task.id, attempt=1, ticket="fabt_x", request=task.request)


async def test_a_ticket_where_nobody_is_charged_is_a_violation(peer, channel) -> None:
    peer.say(redeem())
    assert "nobody is charged" in await within(channel.wait_closed())


async def test_tokens_go_on_while_a_ticket_is_redeemed(peer, channel) -> None:
    channel.till = till = HeldTill()
    task = make_task(2)
    run = await start(peer, channel, task)
    peer.say(redeem(), accepted(task), token(task, 0), finished(task))
    assert len(await run) == 3
    till.open.set()
    assert await peer.hear() == Redeemed(task_id="run_1", attempt=1)
    assert till.settled == []


@pytest.mark.parametrize("refuse", [False, True])
async def test_what_is_admitted_for_an_instance_that_left_is_given_back(
    peer, channel, refuse
) -> None:
    channel.till = till = HeldTill()
    till.refuse = refuse
    peer.say(redeem())
    peer.hang_up()
    await within(channel.wait_closed())
    till.open.set()
    async with asyncio.timeout(20):
        while channel._tolls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [(one.task_id, one.usage) for one in till.settled] == [("run_1", Usage())] * (not refuse)
