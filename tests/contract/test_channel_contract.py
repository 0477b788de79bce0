"""What every channel promises, whichever way its tasks travel."""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from fabric.dispatch.protocol import Channel
from fabric.errors import SessionLost
from fabric.messages import (
    EMBED_SAMPLING,
    Accepted,
    Event,
    Failed,
    Finished,
    ProgramInput,
    PromptScored,
    Request,
    Sampling,
    Saves,
    Task,
    TextInput,
    Token,
    new_id,
)
from fabric.programs import read_header
from fabric.testing.patience import within

LONG = 1000


def make_task(channel: Channel, *, max_tokens: int = 5, **fields: object) -> Task:
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=0.0,
        **{name: fields.pop(name) for name in ("n", "prompt_logprobs") if name in fields},
    )
    request = Request(
        model="fixed", input=TextInput(text="three words long"), sampling=sampling, stream=True
    )
    defaults = {"attempt": 1, "digest": channel.hello.digest, "deadline_s": 60.0}
    return Task(**{"id": request.id, "request": request, **defaults, **fields})


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def tokens_of(events: list[Event], choice: int = 0) -> list[Token]:
    return [event for event in events if isinstance(event, Token) and event.choice == choice]


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(token.text for token in tokens_of(events, choice))


async def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - channels are polled, they have no events for this
            await asyncio.sleep(0.01)


async def wait_busy(rig) -> None:
    await wait_until(lambda: rig.channel.load.num_running, timeout_s=20.0 + rig.lag_s)


async def wait_idle(rig) -> None:
    """Wait for what a row that is kept would never give: a task is much longer than that."""
    await wait_until(lambda: not rig.channel.load.num_running, timeout_s=20.0 + rig.lag_s)


async def test_events_come_in_order_and_end_once(open_rig) -> None:
    async with open_rig() as rig:
        task = make_task(rig.channel, max_tokens=4)
        events = await collect(rig.channel.run(task))
    assert [type(event) for event in events] == [Accepted, Token, Token, Token, Token, Finished]
    assert {(event.task_id, event.attempt) for event in events} == {(task.id, 1)}
    assert [token.position for token in tokens_of(events)] == [0, 1, 2, 3]
    assert text_of(events) == "word0 word1 word2 word3"
    assert events[-1].finish_reasons == ("length",)
    assert events[-1].usage.output_tokens == 4


async def test_what_a_program_saves_arrives_beside_its_tokens(open_rig) -> None:
    read, save = {"op": "read", "at": "layers.1.out"}, {"op": "save", "name": "h", "x": 0}
    runs = [
        {"id": "a", "ids": [1, 2], "nodes": [read, save], "gen": {"max_tokens": 2}},
        {"id": "b", "ids": [3], "nodes": [read, save | {"stream": True}]},
    ]
    asked = ProgramInput.model_validate({"program": {"runs": runs}})
    async with open_rig() as rig:
        assert rig.channel.hello.points is not None
        assert "program" in rig.channel.hello.limits.modes
        request = Request(mode="program", model="fixed", input=asked, sampling=EMBED_SAMPLING)
        task = make_task(rig.channel, id=request.id, request=request)
        events = await collect(rig.channel.run(task))
    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Finished)
    saves = {(event.run, event.step): event for event in events if isinstance(event, Saves)}
    assert set(saves) == {("a", None), ("b", 0)}
    assert {(event.task_id, event.attempt) for event in events} == {(task.id, 1)}
    assert len(tokens_of(events)) == 2
    tensor = read_header(base64.b64decode(saves["a", None].data))["h"]
    # The two of the prompt and the first of the generated ones have been read.
    assert tensor.shape[0] == 3
    assert events[-1].usage.hook_bytes_out == sum(one.size for one in saves.values())


async def test_all_choices_and_prompt_scores_arrive(open_rig) -> None:
    async with open_rig() as rig:
        task = make_task(rig.channel, max_tokens=2, n=3, prompt_logprobs=True)
        events = await collect(rig.channel.run(task))
    assert isinstance(events[1], PromptScored)
    assert len(events[1].tokens) == 3
    for choice in range(3):
        assert text_of(events, choice) == "word0 word1"


async def test_tasks_run_at_once_and_do_not_mix(open_rig) -> None:
    token_s = 0.02 + open_rig.lag_s / 10
    async with open_rig(f"token_s={token_s}") as rig:
        tasks = [make_task(rig.channel, max_tokens=10) for _ in range(3)]
        began_at = time.monotonic()
        runs = await asyncio.gather(*(collect(rig.channel.run(task)) for task in tasks))
        took_s = time.monotonic() - began_at
    for task, events in zip(tasks, runs, strict=True):
        assert {event.task_id for event in events} == {task.id}
        assert len(tokens_of(events)) == 10
    assert took_s < 2.75 * 10 * token_s, "three tasks ran one after another"


async def test_streaming_channels_deliver_tokens_while_the_task_runs(open_streaming_rig) -> None:
    async with open_streaming_rig("token_s=0.3") as rig:
        assert rig.channel.streams
        arrived_at = [
            time.monotonic()
            async for event in rig.channel.run(make_task(rig.channel, max_tokens=3))
            if isinstance(event, Token)
        ]
    assert arrived_at[2] - arrived_at[0] > 0.5


async def test_failure_in_the_middle_is_the_last_event_and_harms_nobody(open_rig) -> None:
    async with open_rig("fail_after=6") as rig:
        failing = make_task(rig.channel, max_tokens=10)
        healthy = make_task(rig.channel, max_tokens=2)
        failed, finished = await asyncio.gather(
            collect(rig.channel.run(failing)), collect(rig.channel.run(healthy))
        )
    assert len(tokens_of(failed)) == 6
    assert isinstance(failed[-1], Failed)
    assert failed[-1].failure.code == "row_failed"
    assert failed[-1].usage.output_tokens == 6
    assert isinstance(finished[-1], Finished)


async def test_task_beyond_the_context_fails_typed(open_rig) -> None:
    async with open_rig("context_tokens=10") as rig:
        events = await collect(rig.channel.run(make_task(rig.channel, max_tokens=100)))
    assert [type(event) for event in events] == [Failed]
    assert events[0].failure.code == "context_length_exceeded"


async def test_digest_mismatch_fails_typed(open_rig) -> None:
    async with open_rig() as rig:
        events = await collect(rig.channel.run(make_task(rig.channel, digest="sha256:other")))
    assert [type(event) for event in events] == [Failed]
    assert events[0].failure.code == "digest_mismatch"


async def test_deadline_ends_the_task(open_rig) -> None:
    async with open_rig("token_s=0.05") as rig:
        task = make_task(rig.channel, max_tokens=LONG, deadline_s=0.3)
        events = await within(collect(rig.channel.run(task)))
        assert isinstance(events[-1], Failed)
        assert events[-1].failure.code == "deadline_exceeded"
        assert tokens_of(events)
        await wait_idle(rig)


async def test_prefix_is_continued_after_its_end(open_rig) -> None:
    async with open_rig() as rig:
        task = make_task(rig.channel, max_tokens=5, prefix=(1000, 1001, 1002))
        events = await collect(rig.channel.run(task))
    assert [token.position for token in tokens_of(events)] == [3, 4]
    assert text_of(events) == " word3 word4"


async def test_cancelled_consumer_frees_the_row_within_a_second(open_rig) -> None:
    async with open_rig("token_s=0.05") as rig:
        consumer = asyncio.create_task(
            collect(rig.channel.run(make_task(rig.channel, max_tokens=LONG)))
        )
        await wait_busy(rig)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        await wait_idle(rig)
        again = await collect(rig.channel.run(make_task(rig.channel, max_tokens=2)))
        assert isinstance(again[-1], Finished)


async def test_cancelled_task_tells_what_it_computed(open_rig) -> None:
    async with open_rig("token_s=0.05") as rig:
        task = make_task(rig.channel, max_tokens=LONG)
        run = asyncio.create_task(collect(rig.channel.run(task)))
        await wait_busy(rig)
        await rig.channel.cancel("run_unknown", 1)
        await rig.channel.cancel(task.id, 2)
        assert not run.done()
        await rig.channel.cancel(task.id, task.attempt)
        events = await within(run, 20 + rig.lag_s)
        assert isinstance(events[-1], Failed)
        assert events[-1].failure.code == "request_cancelled"
        assert 0 < events[-1].usage.output_tokens < LONG
        await wait_idle(rig)


async def test_early_aclose_frees_the_row_within_a_second(open_streaming_rig) -> None:
    async with open_streaming_rig("token_s=0.05") as rig:
        assert rig.channel.streams
        async with aclosing(rig.channel.run(make_task(rig.channel, max_tokens=LONG))) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
            await wait_busy(rig)
        await wait_idle(rig)


async def test_killed_instance_ends_every_run_with_session_lost(open_rig) -> None:
    async with open_rig("token_s=0.05") as rig:
        runs = [
            asyncio.create_task(collect(rig.channel.run(make_task(rig.channel, max_tokens=LONG))))
            for _ in range(2)
        ]
        await wait_busy(rig)
        rig.kill()
        ends = asyncio.gather(*runs, return_exceptions=True)
        outcomes = await within(ends, 20 + rig.lag_s)
        assert [type(outcome) for outcome in outcomes] == [SessionLost, SessionLost]
        assert await within(rig.channel.wait_closed(), 20 + rig.lag_s)
        with pytest.raises(SessionLost):
            await collect(rig.channel.run(make_task(rig.channel)))


async def test_slow_consumer_stalls_only_itself(open_streaming_rig) -> None:
    async with open_streaming_rig() as rig:
        assert rig.channel.streams
        slow_task = make_task(rig.channel, max_tokens=200, window=4)
        async with aclosing(rig.channel.run(slow_task)) as slow:
            taken = [await anext(slow), await anext(slow)]
            quick = await collect(rig.channel.run(make_task(rig.channel, max_tokens=200)))
            assert len(tokens_of(quick)) == 200
            await wait_idle(rig)  # a slow reader keeps no row either
            taken += await collect(slow)
    assert [token.position for token in tokens_of(taken)] == list(range(200))
    assert isinstance(taken[-1], Finished)


async def test_drain_finishes_what_runs_and_takes_nothing_new(open_rig) -> None:
    async with open_rig(f"token_s={0.05 + open_rig.lag_s / 40}") as rig:
        running = asyncio.create_task(
            collect(rig.channel.run(make_task(rig.channel, max_tokens=40)))
        )
        await wait_busy(rig)
        await rig.channel.drain("maintenance")
        await wait_until(lambda: rig.channel.draining)
        try:
            late = await collect(rig.channel.run(make_task(rig.channel)))
        except SessionLost:
            pass
        else:
            assert late[-1].failure.code == "engine_stopped"
        events = await running
        assert len(tokens_of(events)) == 40
        assert isinstance(events[-1], Finished)
        assert await within(rig.channel.wait_closed(), 20 + rig.lag_s)


async def test_close_ends_runs_and_is_harmless_twice(open_rig) -> None:
    async with open_rig("token_s=0.05") as rig:
        run = asyncio.create_task(collect(rig.channel.run(make_task(rig.channel, max_tokens=LONG))))
        await wait_busy(rig)
        await rig.channel.close()
        with pytest.raises(SessionLost):
            await within(run)
        await rig.channel.close()
        with pytest.raises(SessionLost):
            await collect(rig.channel.run(make_task(rig.channel)))
        assert await within(rig.channel.wait_closed())


async def test_attempts_of_one_task_are_told_apart(open_rig) -> None:
    async with open_rig() as rig:
        task_id = new_id("run")
        tasks = [make_task(rig.channel, id=task_id, attempt=attempt) for attempt in (1, 2)]
        runs = await asyncio.gather(*(collect(rig.channel.run(task)) for task in tasks))
    for attempt, events in enumerate(runs, start=1):
        assert {event.attempt for event in events} == {attempt}
        assert len(tokens_of(events)) == 5


async def test_crowd_with_cancellations_loses_nothing(open_rig) -> None:
    async with open_rig("token_s=0.002") as rig:

        async def visit(number: int) -> str:
            events = rig.channel.run(make_task(rig.channel, max_tokens=40, window=8))
            if number % 3:
                return text_of(await collect(events))
            async with aclosing(events):
                await anext(events)
            return "left"

        visits = await asyncio.gather(*(visit(number) for number in range(24)))
        await wait_idle(rig)
    whole = " ".join(f"word{position}" for position in range(40))
    assert Counter(visits) == {whole: 16, "left": 8}
