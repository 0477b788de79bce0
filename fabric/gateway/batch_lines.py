"""The lines of batches, answered as the routes of OpenAI's API answer requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.types import Message

from fabric.auth import Identity
from fabric.batches import Rows
from fabric.batches.answerer import Write
from fabric.broker import Broker, Run
from fabric.catalog import Catalog
from fabric.errors import FabricError, UnsupportedParameter
from fabric.gateway.chat import ChatShape
from fabric.gateway.completions import CompletionShape
from fabric.gateway.exchange import Exchange
from fabric.gateway.metrics import Metrics
from fabric.gateway.openai_models import ChatBody, CompletionBody, Generation
from fabric.gateway.refusals import error_object, refusal_of
from fabric.gateway.replies import Json, Shape, whole_body
from fabric.messages import Request
from fabric.sql import Offload


@dataclass(frozen=True, slots=True, kw_only=True)
class LineAnswer:
    """The ``Answer`` of a line."""

    request_id: str
    body: Json
    charge_usu: int
    runs: Sequence[Run]
    broker: Broker

    async def keep(self, write: Write) -> None:
        """Charge the line's runs together with the writing of its result."""
        await self.broker.conclude([run.id for run in self.runs], write)


class LineAnswerer:
    """The ``Answerer`` over a broker.

    Args:
        broker: Runs the requests.
        catalog: Knows the models.
        offload: The database's thread.
        metrics: Hears of latencies.
    """

    def __init__(
        self, *, broker: Broker, catalog: Catalog, offload: Offload, metrics: Metrics
    ) -> None:
        self._broker = broker
        self._catalog = catalog
        self._offload = offload
        self._metrics = metrics

    async def find(self, caller: Identity, model: str) -> str:
        """Return a model's catalogued name."""
        seen = self._catalog.seen_by(await self._broker.rules.permits(caller))
        return (await self._offload(seen.resolve, model)).ref

    def rows(self, model: str) -> Rows:
        """Return how busy the replicas of a catalogued model are."""
        views = [view for view in self._broker.replicas() if view.model == model]
        busy = (max(v.num_in_flight, v.load.num_running + v.load.num_waiting) for v in views)
        return Rows(sum(view.limits.max_rows for view in views), sum(busy))

    async def answer(
        self, caller: Identity, endpoint: str, body: Json, *, seed: str, deadline_s: float
    ) -> LineAnswer:
        """Answer one request; see ``Answerer``."""
        parsed, shape, asked = _read(endpoint, body)
        own: Json = {"tier": "batch"}
        if parsed.fabric is None or parsed.fabric.deadline_s is None:
            own["deadline_s"] = deadline_s
        requests = [
            request.model_copy(update={"id": _run_id(seed, index), **own})
            for index, request in enumerate(asked)
        ]
        runs: list[Run] = []
        began_at = time.perf_counter()
        try:
            for request in requests:
                runs.append(await self._broker.submit(caller, request, deferred=True))
            exchange = Exchange(runs, requests, _stay, self._metrics, began_at=began_at)
            reply, _ = await whole_body(exchange, shape, model=parsed.model)
        except BaseException:
            await self._drop(runs)
            raise
        ours = reply["fabric"]
        assert isinstance(ours, dict)
        return LineAnswer(
            request_id=runs[0].id,
            body=reply,
            charge_usu=ours["charge_usu"],
            runs=runs,
            broker=self._broker,
        )

    def refusal(self, error: FabricError) -> Json:
        """Return the body that tells a client of an error."""
        return {"error": error_object(error)}

    async def _drop(self, runs: Sequence[Run]) -> None:
        for run in runs:
            await run.cancel()
        await self._broker.conclude([run.id for run in runs], lambda: False)


def _read(endpoint: str, body: Json) -> tuple[Generation, Shape, list[Request]]:
    """Return a line's body, how its reply is spelt, and what it asks.

    Raises:
        FabricError: A parameter is unknown, missing, of the wrong type or out of bounds.
    """
    data = json.dumps(body)
    parsed: ChatBody | CompletionBody
    shape: Shape
    try:
        if endpoint == "/v1/chat/completions":
            parsed = ChatBody.model_validate_json(data)
            shape, asked = ChatShape(scores=bool(parsed.logprobs)), [parsed.to_request()]
        else:
            parsed = CompletionBody.model_validate_json(data)
            shape, asked = CompletionShape(parsed), list(parsed.requests())
    except ValidationError as error:
        raise refusal_of(error) from None
    if parsed.stream:
        reason = "a batch has no streams; leave it out"
        raise UnsupportedParameter(param="stream", value=True, reason=reason)
    return parsed, shape, asked


def _run_id(seed: str, index: int) -> str:
    return "run_" + hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()[:32]


async def _stay() -> Message:
    """The channel of a client that never leaves."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")
