"""The Parsl relay: tasks travel to an instance through a HighThroughputExecutor's workers.

It needs no connection between the hub and the instance beyond Parsl's own. Results come back
through Parsl's pickles, so it is for executors whose workers the hub's operator runs, never across
trust domains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from fabric.dispatch.relay import RelayFigures
from fabric.errors import ProtocolViolation
from fabric.launch import worker
from fabric.messages import (
    Accepted,
    Cancel,
    Drain,
    Embedding,
    Event,
    Failed,
    Finished,
    Heartbeat,
    Hello,
    PromptScored,
    Saves,
    Task,
    Token,
    parse_from_instance,
)

Submit = Callable[..., "Future[object]"]
"""``submit(function, *args)`` runs the function on some worker, as ``Block.submit`` does."""


class ParslRelay:
    """A ``Relay`` over an executor's workers; each task keeps one worker.

    Args:
        submit: Runs a function on a worker that can reach the instance.
        direct_url: The instance's direct route.
        direct_token: Its direct token.
        num_relays: How many tasks may run at once; fewer than there are workers.
        poll_s: How often the instance is asked for its load; three misses end the channel.
    """

    def __init__(
        self,
        submit: Submit,
        *,
        direct_url: str,
        direct_token: str,
        num_relays: int = 1,
        poll_s: float = 2.0,
    ) -> None:
        self.figures = RelayFigures(max_batches=num_relays, poll_s=poll_s, idle_poll_s=poll_s)
        self._submit = submit
        self._address = (direct_url, direct_token)

    async def describe(self) -> tuple[Hello, Heartbeat]:
        """Return what the instance says of itself; see ``Relay.describe``."""
        lines = await _result(self._submit(worker.describe, *self._address))
        hello, heartbeat = (parse_from_instance(line) for line in lines)
        if not isinstance(hello, Hello) or not isinstance(heartbeat, Heartbeat):
            raise ProtocolViolation(
                peer="The instance", reason=f"{hello.type} and {heartbeat.type} to open a session"
            )
        return hello, heartbeat

    async def run(self, tasks: Sequence[Task]) -> list[list[Event]]:
        """Run tasks on a worker; see ``Relay.run``."""
        texts = [task.model_dump_json() for task in tasks]
        answers = await _result(self._submit(worker.relay, *self._address, texts))
        return [_parse(task, lines) for task, lines in zip(tasks, answers, strict=True)]

    def send(self, frames: Sequence[Cancel | Drain]) -> None:
        """Send the instance frames; see ``Relay.send``."""
        for frame in frames:
            self._submit(worker.send, *self._address, frame.model_dump_json())


async def _result(future: Future[object]) -> list[Any]:
    """Return what a worker returned; a lost worker and a lost instance are both lost connections.

    Parsl's future is only watched, never wrapped: cancelling it would end Parsl's result thread.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    future.add_done_callback(lambda _: _call(loop, done.set))
    await done.wait()
    error = future.exception()
    if error is not None:
        raise ConnectionError(str(error) or type(error).__name__) from error
    lines = future.result()
    assert isinstance(lines, list)
    return lines


def _parse(task: Task, lines: Sequence[str]) -> list[Event]:
    events: list[Event] = []
    for line in lines:
        event = parse_from_instance(line)
        if not isinstance(
            event, Accepted | PromptScored | Token | Embedding | Saves | Finished | Failed
        ) or ((event.task_id, event.attempt) != (task.id, task.attempt)):
            raise ProtocolViolation(
                peer="The instance", reason=f"a {event.type} that is not of the task"
            )
        events.append(event)
    return events


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
