"""The Globus Compute relay: tasks travel to an instance by the registered function ``infer``.

For sites whose nodes cannot dial the hub. Everything is JSON, on both ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from fabric.compute import JSON, ComputePool, ComputeTarget
from fabric.dispatch.relay import RelayFigures
from fabric.errors import ProtocolViolation
from fabric.messages import Cancel, Drain, Event, Failure, Heartbeat, Hello, Task
from fabric.payloads import PayloadStore, unpack

TRANSIT_S = 30.0
"""What a task may take on its way there and back, beyond its own deadline."""

SEND_TIMEOUT_S = 60.0

FIGURES = RelayFigures(
    max_batches=3,
    num_spare=1,
    max_tasks=256,
    poll_s=5.0,
    idle_poll_s=30.0,
    poll_timeout_s=10.0,
    delivery_s=10.0,
    grace_s=TRANSIT_S,
)
"""For endpoints with five workers or more besides those that hold instances.

A question costs one of the requests that the service allows, so a quiet instance is asked seldom;
one that has tasks is given up after 45 s of silence.
"""

_events: TypeAdapter[list[list[Event]]] = TypeAdapter(list[list[Event]])


class ComputeRelay:
    """A ``Relay`` over a Globus Compute endpoint.

    Args:
        pool: A started pool.
        target: The endpoint and its configuration.
        function_id: The registered ``infer``.
        instance: The instance's id.
        direct_token: Its direct token.
        run_dir: Where the site keeps its instances' files.
        stores: Where results too large for the service may be kept.
        figures: How many tasks at once, and how often the instance is asked.
    """

    def __init__(
        self,
        pool: ComputePool,
        target: ComputeTarget,
        function_id: UUID,
        *,
        instance: str,
        direct_token: str,
        run_dir: str = "~/.fabric",
        stores: Sequence[PayloadStore] = (),
        figures: RelayFigures = FIGURES,
    ) -> None:
        self.figures = figures
        self._pool = pool
        self._target = target
        self._function_id = function_id
        self._batch: dict[str, JSON] = {"instance": instance, "model": None, "token": direct_token}
        self._run_dir = run_dir
        self._stores = stores

    async def describe(self) -> tuple[Hello, Heartbeat]:
        """Return what the instance says of itself; see ``Relay.describe``."""
        answer = await self._infer(timeout_s=self.figures.poll_timeout_s, describe=True)
        try:
            if "error" in answer:
                raise Failure.model_validate(answer["error"]).to_error()
            hello = Hello.model_validate(answer["hello"])
            return hello, Heartbeat.model_validate(answer["heartbeat"])
        except (KeyError, ValidationError) as error:
            raise _violation(error) from error

    async def run(self, tasks: Sequence[Task]) -> list[list[Event]]:
        """Run tasks on a worker; see ``Relay.run``."""
        longest_s = max(task.deadline_s for task in tasks)
        answer = await self._infer(
            timeout_s=longest_s + self.figures.grace_s,
            tasks=[task.model_dump(mode="json") for task in tasks],
        )
        try:
            answers = _events.validate_python(answer["events"])
        except (KeyError, ValidationError) as error:
            raise _violation(error) from error
        for task, events in zip(tasks, answers, strict=True):
            if any((event.task_id, event.attempt) != (task.id, task.attempt) for event in events):
                raise ProtocolViolation(peer="The site", reason="an event of another task")
        return answers

    def send(self, frames: Sequence[Cancel | Drain]) -> None:
        """Send the instance frames; see ``Relay.send``."""
        self._submit(
            timeout_s=SEND_TIMEOUT_S, frames=[frame.model_dump(mode="json") for frame in frames]
        )

    async def _infer(self, *, timeout_s: float, **fields: JSON) -> dict[str, Any]:
        answer: Any = await asyncio.wrap_future(self._submit(timeout_s=timeout_s, **fields))
        if isinstance(answer, dict) and "$ref" in answer:
            answer = await asyncio.to_thread(unpack, answer, self._stores, evict=True)
        if not isinstance(answer, dict):
            raise ProtocolViolation(peer="The site", reason=f"a {type(answer).__name__}")
        return answer

    def _submit(self, *, timeout_s: float, **fields: JSON) -> Future[JSON]:
        args = ({**self._batch, **fields}, self._run_dir)
        return self._pool.submit(self._target, self._function_id, args, timeout_s=timeout_s)


def _violation(error: Exception) -> ProtocolViolation:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        reason = f"an answer without {error}"
    return ProtocolViolation(peer="The site", reason=reason)
