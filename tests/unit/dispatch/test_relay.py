"""A relay channel over a relay that answers when the test tells it to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest

from fabric.dispatch import relay as relay_module
from fabric.dispatch.relay import RelayChannel, RelayFigures
from fabric.errors import PayloadTooLarge, ProtocolViolation, SessionLost, TaskLost
from fabric.messages import (
    Accepted,
    Cancel,
    Drain,
    Event,
    Failed,
    Failure,
    Finished,
    Heartbeat,
    Hello,
    InstanceState,
    Limits,
    Load,
    Request,
    Sampling,
    Task,
    TextInput,
    Usage,
)
from fabric.testing.patience import within

HELLO = Hello(
    instance="instance-1",
    site="alpha",
    model="fixed",
    digest="sha256:0",
    limits=Limits(context_tokens=1000, max_rows=4, cache_tokens=4000),
    dtype="float32",
    engine="scripted",
)
READY = Heartbeat(state=InstanceState.READY, load=Load(num_running=1))
IDLE = Heartbeat(state=InstanceState.READY, load=Load())
FIGURES = RelayFigures(
    max_batches=2,
    max_tasks=4,
    poll_s=0.02,
    idle_poll_s=0.02,
    poll_timeout_s=0.2,
    grace_s=0.2,
)


class ScriptedRelay:
    """A ``Relay`` whose batches wait until the test ends them."""

    def __init__(self, figures: RelayFigures = FIGURES) -> None:
        self.figures = figures
        self.hello = HELLO
        self.heartbeat: Heartbeat | Exception | None = READY
        self.batches: list[tuple[list[Task], asyncio.Future]] = []
        self.sent: list[Cancel | Drain] = []

    async def describe(self) -> tuple[Hello, Heartbeat]:
        if self.heartbeat is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(self.heartbeat, Exception):
            raise self.heartbeat
        return self.hello, self.heartbeat

    async def run(self, tasks: Sequence[Task]) -> list[list[Event]]:
        answer = asyncio.get_running_loop().create_future()
        self.batches.append((list(tasks), answer))
        return await answer

    def send(self, frames: Sequence[Cancel | Drain]) -> None:
        self.sent.extend(frames)

    def answer(self, number: int, answers: list | Exception | None = None) -> None:
        tasks, future = self.batches[number]
        if isinstance(answers, Exception):
            future.set_exception(answers)
        else:
            future.set_result(answers or [whole(task) for task in tasks])

    @property
    def sizes(self) -> list[int]:
        return [len(tasks) for tasks, _ in self.batches]


def make_task(number: int, *, max_tokens: int = 10, deadline_s: float = 60.0, **fields) -> Task:
    request = Request(
        id=f"run_{number}",
        model="fixed",
        input=TextInput(text=fields.pop("text", "hello")),
        sampling=Sampling(max_tokens=max_tokens),
    )
    defaults = {"attempt": 1, "digest": HELLO.digest}
    return Task(
        **{"id": request.id, "request": request, **defaults, **fields}, deadline_s=deadline_s
    )


def whole(task: Task) -> list[Event]:
    key = {"task_id": task.id, "attempt": task.attempt}
    return [
        Accepted(**key, prompt_tokens=1),
        Finished(**key, finish_reasons=("stop",), usage=Usage()),
    ]


def failed(task: Task, error) -> Failed:
    return Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(error))


async def collect(channel: RelayChannel, task: Task) -> list[Event]:
    return [event async for event in channel.run(task)]


def start(channel: RelayChannel, *tasks: Task) -> list[asyncio.Task]:
    return [asyncio.create_task(collect(channel, task)) for task in tasks]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@pytest.fixture
def relay() -> ScriptedRelay:
    return ScriptedRelay()


@pytest.fixture
async def channel(relay: ScriptedRelay) -> AsyncIterator[RelayChannel]:
    channel = await RelayChannel.open(relay)
    yield channel
    await channel.close()


# ---- batches ---------------------------------------------------------------------------------


async def test_lone_task_goes_at_once(relay, channel) -> None:
    (run,) = start(channel, make_task(1))
    await until(lambda: relay.batches)
    assert relay.sizes == [1]
    relay.answer(0)
    assert [type(event) for event in await run] == [Accepted, Finished]


async def test_tasks_gather_while_batches_are_under_way(relay, channel) -> None:
    runs = []
    for number in range(2):
        runs += start(channel, make_task(number))
        await until(lambda number=number: len(relay.batches) == number + 1)
    runs += start(channel, *(make_task(number) for number in range(2, 9)))
    await asyncio.sleep(0.05)
    assert relay.sizes == [1, 1], "more batches are under way than the relay takes"
    relay.answer(1)
    await until(lambda: len(relay.batches) == 3)
    relay.answer(0)
    await until(lambda: len(relay.batches) == 4)
    assert relay.sizes == [1, 1, 4, 3]
    relay.answer(2)
    relay.answer(3)
    assert all(len(events) == 2 for events in await asyncio.gather(*runs))


async def test_tasks_that_come_at_once_go_at_once(relay, channel) -> None:
    start(channel, *(make_task(number) for number in range(4)))
    await until(lambda: relay.batches)
    assert relay.sizes == [4]


async def test_short_tasks_do_not_wait_for_long_ones(relay, channel) -> None:
    long, *short = start(
        channel, make_task(0, max_tokens=900), make_task(1), make_task(2, max_tokens=9)
    )
    await until(lambda: len(relay.batches) == 2)
    relay.answer(1)
    await asyncio.gather(*short)
    assert not long.done()


async def test_batch_is_bounded_by_its_bytes(relay) -> None:
    size = len(make_task(0).model_dump_json())
    relay.figures = replace(FIGURES, max_bytes=2 * size + 10, max_batches=3)
    channel = await RelayChannel.open(relay)
    start(channel, *(make_task(number) for number in range(5)))
    await until(lambda: len(relay.batches) == 3)
    assert relay.sizes == [2, 2, 1]
    await channel.close()


async def test_batch_is_bounded_by_the_answer_it_may_have(relay) -> None:
    relay.figures = replace(FIGURES, max_answer_bytes=500_000)
    channel = await RelayChannel.open(relay)
    start(channel, *(make_task(number, max_tokens=1000) for number in range(3)))
    await until(lambda: len(relay.batches) == 2)
    assert relay.sizes == [2, 1]
    await channel.close()


async def test_tasks_whose_answers_do_not_fit_together_go_alone(relay, channel) -> None:
    error = PayloadTooLarge(size_bytes=12, cap_bytes=10, remedy="ask for less")
    tasks = [make_task(1), make_task(2), make_task(3)]
    runs = start(channel, *tasks)
    await until(lambda: relay.batches)
    relay.answer(0, [whole(tasks[0]), [failed(tasks[1], error)], [failed(tasks[2], error)]])
    assert isinstance((await runs[0])[-1], Finished)
    await until(lambda: len(relay.batches) == 3)
    assert relay.sizes == [3, 1, 1]
    relay.answer(1)
    relay.answer(2, error)
    assert isinstance((await runs[1])[-1], Finished)
    (last,) = await runs[2]
    assert last.failure.code == "payload_too_large"


async def test_batch_fills_the_rows_of_its_instance_four_times_at_most(relay) -> None:
    relay.figures = replace(FIGURES, max_tasks=100)
    channel = await RelayChannel.open(relay)
    start(channel, *(make_task(number) for number in range(20)))
    await until(lambda: len(relay.batches) == 2)
    assert relay.sizes == [4 * HELLO.limits.max_rows, 4]
    await channel.close()


async def test_short_tasks_get_through_beside_long_ones(relay) -> None:
    relay.figures = replace(FIGURES, max_batches=1, num_spare=1)
    channel = await RelayChannel.open(relay)
    start(channel, make_task(1, max_tokens=900))
    await until(lambda: relay.batches)
    start(channel, make_task(2, max_tokens=900), make_task(3), make_task(4))
    await until(lambda: len(relay.batches) == 2)
    assert [task.id for task in relay.batches[1][0]] == ["run_3", "run_4"]
    await channel.close()


async def test_waiting_counts_towards_the_deadline(relay) -> None:
    relay.figures = replace(FIGURES, max_batches=1)
    channel = await RelayChannel.open(relay)
    (first,) = start(channel, make_task(1))
    await until(lambda: relay.batches)
    second, third = start(channel, make_task(2, deadline_s=30.0), make_task(3, deadline_s=0.1))
    (expired,) = await third
    assert expired.failure.code == "deadline_exceeded"
    relay.answer(0)
    await first
    await until(lambda: len(relay.batches) == 2)
    (sent,) = relay.batches[1][0]
    assert sent.id == "run_2"
    assert sent.deadline_s < 29.9
    relay.answer(1)
    await second
    await channel.close()


# ---- one task --------------------------------------------------------------------------------


async def test_same_attempt_twice_at_once_is_refused(relay, channel) -> None:
    start(channel, make_task(1))
    await until(lambda: relay.batches)
    with pytest.raises(ProtocolViolation, match="twice"):
        await collect(channel, make_task(1))
    assert relay.sizes == [1]


async def test_cancel_before_it_is_sent_needs_no_instance(relay) -> None:
    relay.figures = replace(FIGURES, max_batches=1)
    channel = await RelayChannel.open(relay)
    _, waiting = start(channel, make_task(1), make_task(2, max_tokens=900))
    await until(lambda: relay.batches)
    await channel.cancel("run_2", 1)
    (event,) = await waiting
    assert event.failure.code == "request_cancelled"
    assert relay.sent == []
    await channel.close()


async def test_cancel_of_a_sent_task_reaches_the_instance_and_holds_nobody(relay, channel) -> None:
    one, two = start(channel, make_task(1), make_task(2))
    await until(lambda: relay.batches)
    await channel.cancel("run_1", 1)
    await until(lambda: relay.sent)
    assert relay.sent == [Cancel(task_id="run_1", attempt=1)]
    relay.answer(0)
    await asyncio.gather(one, two)


async def test_consumer_that_left_is_cancelled_and_its_answer_dropped(relay, channel) -> None:
    left, stays = start(channel, make_task(1), make_task(2))
    await until(lambda: relay.batches)
    left.cancel()
    await until(lambda: relay.sent)
    relay.answer(0)
    assert len(await stays) == 2
    await until(lambda: channel.num_stray_answers == 1)


async def test_task_lost_on_site_ends_after_the_events_it_had(relay, channel) -> None:
    task = make_task(1)
    events = []

    async def run() -> None:
        async for event in channel.run(task):
            events.append(event)

    running = asyncio.create_task(run())
    await until(lambda: relay.batches)
    lost = failed(task, SessionLost(instance="instance-1", reason="killed"))
    relay.answer(0, [[whole(task)[0], lost]])
    with pytest.raises(SessionLost, match="killed"):
        await running
    assert [type(event) for event in events] == [Accepted]


async def test_lost_batch_is_lost_for_each_of_its_tasks_alone(relay, channel) -> None:
    runs = start(channel, make_task(1), make_task(2))
    await until(lambda: relay.batches)
    other = start(channel, make_task(3))
    await until(lambda: len(relay.batches) == 2)
    relay.answer(0, TaskLost(task_id="t", reason="its worker went"))
    for outcome in await asyncio.gather(*runs, return_exceptions=True):
        assert isinstance(outcome, SessionLost)
        assert "its worker went" in outcome.message
    relay.answer(1)
    await asyncio.gather(*other)


async def test_answer_without_an_end_is_a_violation(relay, channel) -> None:
    (run,) = start(channel, make_task(1))
    await until(lambda: relay.batches)
    relay.answer(0, [[whole(make_task(1))[0]]])
    with pytest.raises(ProtocolViolation):
        await run


async def test_no_answer_by_the_deadline_is_a_lost_session(relay, channel) -> None:
    quick, slow = start(channel, make_task(1, deadline_s=0.1), make_task(2))
    await until(lambda: relay.batches)
    with pytest.raises(SessionLost, match="deadline"):
        await quick
    relay.answer(0)
    await slow
    assert channel.num_stray_answers == 1


# ---- the instance ----------------------------------------------------------------------------


@pytest.mark.parametrize("heartbeat", [None, ConnectionError("gone")])
async def test_silence_ends_the_channel_and_its_tasks(
    relay, channel, heartbeat, monkeypatch
) -> None:
    monkeypatch.setattr(relay_module, "LAST_WORDS_S", 0.1)
    (run,) = start(channel, make_task(1))
    await until(lambda: relay.batches)
    relay.heartbeat = heartbeat
    assert "did not answer 3 times" in await within(channel.wait_closed())
    with pytest.raises(SessionLost):
        await within(run)
    with pytest.raises(SessionLost):
        await collect(channel, make_task(2))


async def test_answers_still_count_after_the_last_missed_poll(relay, channel) -> None:
    (run,) = start(channel, make_task(1))
    await until(lambda: relay.batches)
    relay.heartbeat = ConnectionError("gone")
    await channel.wait_closed()
    relay.answer(0)
    assert isinstance((await run)[-1], Finished)


async def test_another_instance_in_its_place_ends_the_channel(relay, channel) -> None:
    relay.hello = HELLO.model_copy(update={"instance": "instance-2"})
    assert "another instance" in await within(channel.wait_closed())


async def test_idle_instance_has_lost_what_was_sent_before(relay) -> None:
    relay.figures = replace(FIGURES, delivery_s=0.2)
    channel = await RelayChannel.open(relay)
    (run,) = start(channel, make_task(1))
    await until(lambda: relay.batches)
    await asyncio.sleep(0.4)
    assert not run.done(), "the instance says that it has a task"
    relay.heartbeat = IDLE
    with pytest.raises(SessionLost, match="idle"):
        await within(run)
    again = start(channel, make_task(1, attempt=2))
    await until(lambda: len(relay.batches) == 2)
    relay.answer(1)
    await asyncio.gather(*again)
    await channel.close()


async def test_quiet_instance_is_asked_seldom(relay) -> None:
    relay.figures = replace(FIGURES, idle_poll_s=60.0)
    channel = await RelayChannel.open(relay)
    relay.heartbeat = ConnectionError("gone")
    with pytest.raises(TimeoutError):
        await within(channel.wait_closed(), 0.3)
    start(channel, make_task(1))
    await within(channel.wait_closed())
    await channel.close()


async def test_draining_instance_is_given_nothing(relay, channel) -> None:
    relay.heartbeat = Heartbeat(state=InstanceState.DRAINING, load=Load())
    await until(lambda: channel.draining)
    (event,) = await collect(channel, make_task(1))
    assert event.failure.code == "engine_stopped"
    assert relay.batches == []


async def test_unreachable_instance_opens_no_channel(relay) -> None:
    relay.heartbeat = ConnectionError("nobody there")
    with pytest.raises(SessionLost, match="nobody there"):
        await RelayChannel.open(relay)
