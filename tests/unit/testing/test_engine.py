import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fabric.engine.interface import Engine
from fabric.messages import Event, Failed, Finished, Limits, Request, Sampling, Task, TokensInput
from fabric.testing.engine import FixedDelayEngine


@contextmanager
def started(**arguments) -> Iterator[FixedDelayEngine]:
    engine = FixedDelayEngine(**arguments)
    engine.start()
    yield engine
    engine.close()


def submit(engine: Engine, max_tokens: int, n: int = 1) -> queue.Queue[Event]:
    request = Request(
        model="fixed", input=TokensInput(ids=(1, 2)), sampling=Sampling(max_tokens=max_tokens, n=n)
    )
    task = Task(id=request.id, attempt=1, request=request, digest=engine.info.digest, deadline_s=60)
    events: queue.Queue[Event] = queue.Queue()
    engine.submit(task, events.put)
    return events


def last(events: queue.Queue[Event]) -> Event:
    while not isinstance(event := events.get(timeout=20), Finished | Failed):
        pass
    return event


def test_tokens_come_at_the_given_pace() -> None:
    with started(first_token_s=0.1, token_s=0.02) as engine:
        began_at = time.monotonic()
        usage = last(submit(engine, 11)).usage
        took_s = time.monotonic() - began_at
    assert 0.3 <= took_s < 0.4
    assert (usage.prompt_tokens, usage.output_tokens) == (2, 11)


def test_rows_beyond_the_limit_wait_for_their_turn() -> None:
    limits = Limits(context_tokens=100, max_rows=2, cache_tokens=200)
    with started(token_s=0.02, limits=limits) as engine:
        first, second = submit(engine, 10, n=2), submit(engine, 1)
        first.get(timeout=20)
        assert (engine.load().num_running, engine.load().num_waiting) == (2, 1)
        last(first)
        assert last(second).usage.queue_s > 0.15
        assert (engine.load().num_running, engine.load().num_waiting) == (0, 0)


def test_end_of_sequence_is_a_stop_unless_ignored() -> None:
    with started(stop_after=3) as engine:
        end = last(submit(engine, 10))
        assert (end.finish_reasons, end.usage.output_tokens) == (("stop",), 3)
        assert last(submit(engine, 2)).finish_reasons == ("length",)


@pytest.mark.parametrize("when", ["running", "closed"])
def test_closed_engine_fails_its_tasks(when) -> None:
    with started(token_s=0.05) as engine:
        if when == "closed":
            engine.close()
        events = submit(engine, 100)
        engine.close()
        assert last(events).failure.code == "engine_stopped"
