"""Runs of mode ``embed``: charged once by their prompt, moved until the vector is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.broker import Run
from fabric.engine.interface import EventSink
from fabric.messages import (
    EMBED_SAMPLING,
    Embedding,
    Event,
    Finished,
    Placed,
    Request,
    RunCompleted,
    RunState,
    Task,
    pack_floats,
)
from fabric.testing.channel import FakeChannel
from fabric.testing.engine import FixedDelayEngine

Twist = Callable[[Event], Iterable[Event]]


class TwistedEngine(FixedDelayEngine):
    """Says something else than it should."""

    def __init__(self, digest: str, twist: Twist) -> None:
        super().__init__(digest=digest)
        self._twist = twist

    def submit(self, task: Task, sink: EventSink) -> None:
        def twisted(event: Event) -> None:
            for other in self._twist(event):
                sink(other)

        super().submit(task, twisted)


@pytest.fixture
def attach(hub: Any) -> Callable[..., FakeChannel]:
    """Attach an instance at a site; ``twist`` changes what it says."""

    def make(broker: Any, site: str, twist: Twist = lambda event: [event]) -> FakeChannel:
        engine = TwistedEngine(hub.catalog.resolve("fixed").digest, twist)
        engine.start()
        hub.engines.append(engine)
        channel = FakeChannel(engine, site=site, instance=f"{site}-1")
        broker.attach(channel)
        return channel

    return make


@pytest.fixture
def asked(ask: Callable[..., Request]) -> Request:
    return ask(mode="embed", sampling=EMBED_SAMPLING)


async def settled(hub: Any, run: Run) -> Any:
    await hub.offload(lambda: None)
    return hub.catalog.run(run.id)


async def test_a_vector_is_charged_by_its_prompt(
    hub: Any, caller: Identity, asked: Request, read: Any, attach: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    attach(broker, "alpha")
    run = await broker.submit(caller, asked)
    placed, embedding, completed = await read(run)
    assert isinstance(placed, Placed)
    assert isinstance(embedding, Embedding)
    assert isinstance(completed, RunCompleted)
    assert (completed.charge_usu, completed.usage.output_tokens) == (3, 0)
    assert (await settled(hub, run)).charge_usu == 3
    assert hub.allocation().held_usu == 0


async def test_an_instance_lost_after_the_vector_ends_the_run_and_is_not_asked_again(
    hub: Any, caller: Identity, asked: Request, read: Any, until: Any, attach: Any
) -> None:
    hub.grant()
    broker = await hub.broker()
    heard: list[Event] = []

    def never_ends(event: Event) -> list[Event]:
        heard.append(event)
        return [] if isinstance(event, Finished) else [event]

    alpha = attach(broker, "alpha", never_ends)
    run = await broker.submit(caller, asked)
    await until(lambda: any(isinstance(event, Finished) for event in heard))
    attach(broker, "beta")
    alpha.lose("pulled")
    events = await read(run)
    assert [event.type for event in events] == ["placed", "embedding", "completed"]
    record = await settled(hub, run)
    assert (record.state, record.attempts, record.charge_usu) == (RunState.COMPLETED, 1, 3)


@pytest.mark.parametrize("fault", ["nothing", "twice"])
async def test_an_instance_that_breaks_the_rules_is_left_for_another(
    hub: Any, caller: Identity, asked: Request, read: Any, attach: Any, fault: str
) -> None:
    def twist(event: Event) -> list[Event]:
        if isinstance(event, Embedding):
            return [] if fault == "nothing" else [event, event]
        return [event]

    hub.grant()
    broker = await hub.broker()
    attach(broker, "alpha", twist)
    run = await broker.submit(caller, asked)
    if fault == "nothing":
        attach(broker, "beta")
    events = await read(run)
    assert [event for event in events if isinstance(event, Embedding)] != []
    assert sum(isinstance(event, Embedding) for event in events) == 1
    record = await settled(hub, run)
    assert (record.state, record.charge_usu) == (RunState.COMPLETED, 3)
    assert record.site == ("beta" if fault == "nothing" else "alpha")


async def test_a_vector_nobody_asked_for_moves_the_request(
    hub: Any, caller: Identity, ask: Callable[..., Request], read: Any, attach: Any
) -> None:
    def twist(event: Event) -> list[Event]:
        if event.type == "accepted":
            name = {"task_id": event.task_id, "attempt": event.attempt}
            return [event, Embedding(**name, data=pack_floats([1.0]))]
        return [event]

    hub.grant()
    broker = await hub.broker()
    attach(broker, "alpha", twist)
    run = await broker.submit(caller, ask())
    attach(broker, "beta")
    events = await read(run)
    assert not any(isinstance(event, Embedding) for event in events)
    assert isinstance(events[-1], RunCompleted)
    assert events[-1].site == "beta"
