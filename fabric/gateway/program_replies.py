"""From the events of a program's run to its reply, streamed or whole."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.responses import Response

from fabric.artifacts import ArtifactRecord, Artifacts
from fabric.broker.programs import ProgramBounds
from fabric.errors import FabricError, NotFound, ProtocolViolation
from fabric.gateway.exchange import Exchange
from fabric.gateway.refusals import error_object
from fabric.gateway.replies import Json, completed_object, usage_object
from fabric.gateway.sse import DONE, EventStream, frame
from fabric.messages import Placed, RunCompleted, RunFailed, Saves, Token

MAX_REPLY_BYTES = 32 * 2**20
"""Of saves inline in one reply; those of further runs are kept as artifacts."""


@dataclass(slots=True)
class _Part:
    """What has come of one run of a program."""

    id: str
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    names: tuple[str, ...] = ()
    size: int = 0
    data: str | None = None
    handle: Json | None = None

    def to_json(self) -> Json:
        """Return the run as the reply tells it."""
        return {
            "id": self.id,
            "names": list(self.names),
            "size": self.size,
            "data": self.data,
            "handle": self.handle,
            "tokens": self.tokens,
            "text": "".join(self.text),
            "finish_reason": self.finish_reason,
        }


class ProgramReply:
    """Collects what a program returns.

    Args:
        exchange: Its run.
        bounds: What it was admitted with.
        project: Whose it is.
        artifacts: Where large results are.
    """

    def __init__(
        self, exchange: Exchange, bounds: ProgramBounds, project: str, artifacts: Artifacts | None
    ) -> None:
        self._exchange = exchange
        self._project = project
        self._artifacts = artifacts
        self._parts = {run_id: _Part(run_id) for run_id in bounds.run_ids}
        self._by_choice = list(self._parts.values())
        self._left_bytes = MAX_REPLY_BYTES
        self._site = ""
        self._charge_usu = 0

    async def whole(self) -> Response:
        """Return the reply once the program has ended.

        Raises:
            FabricError: It failed.
        """
        async with aclosing(self._news()) as news:
            async for _ in news:
                pass
        body = json.dumps(self._result)
        return Response(body, headers={"x-fabric-site": self._site}, media_type="application/json")

    async def stream(self) -> Response:
        """Return the streamed reply once something is there.

        Raises:
            FabricError: The program failed before that.
        """
        chunks = self._chunks()
        first = await anext(chunks)
        return EventStream(first, chunks, {"x-fabric-site": self._site})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        has_begun = False
        try:
            async with aclosing(self._news()) as news:
                async for one in news:
                    yield frame(json.dumps(one))
                    has_begun = True
        except FabricError as error:
            if not has_begun:
                raise
            ours = {"run": self._exchange.runs[0].id, "charge_usu": self._charge_usu}
            yield frame(json.dumps({"error": error_object(error), "fabric": ours}))
        else:
            yield frame(json.dumps(self._result)) + DONE

    async def _news(self) -> AsyncGenerator[Json, None]:
        """Collect; yield what a stream tells before its end.

        Raises:
            FabricError: The program failed.
        """
        async with self._exchange as exchange:
            async for _, event in exchange.events():
                match event:
                    case Placed():
                        self._site = event.placement.site
                    case Token():
                        yield self._take_token(event)
                    case Saves(step=None):
                        await self._take_saves(event)
                    case Saves():
                        yield {
                            "object": "program.saves",
                            "run": event.run,
                            "step": event.step,
                            "names": event.names,
                            "data": event.data,
                            "handle": await self._handle(event),
                        }
                    case RunCompleted():
                        self._end(event)
                    case RunFailed():
                        self._charge_usu = event.charge_usu
                        raise event.failure.to_error()

    def _take_token(self, token: Token) -> Json:
        part = self._by_choice[token.choice]
        part.tokens.append(token.token_id)
        part.text.append(token.text)
        part.finish_reason = token.finish_reason
        return {
            "object": "program.token",
            "run": part.id,
            "token_id": token.token_id,
            "text": token.text,
        }

    async def _take_saves(self, saves: Saves) -> None:
        part = self._parts[saves.run]
        part.names, part.size = saves.names, saves.size
        part.handle = await self._handle(saves)
        if saves.data is None:
            return
        if saves.size <= self._left_bytes or self._artifacts is None:
            self._left_bytes -= saves.size
            part.data = saves.data
            return
        run_id = self._exchange.runs[0].id
        data = base64.b64decode(saves.data)
        kept = await self._artifacts.keep(self._project, _once(data), run=run_id, part=saves.run)
        part.handle = _handle_object(kept)

    async def _handle(self, saves: Saves) -> Json | None:
        """Return where saves are kept, if they are, and are this project's."""
        if saves.handle is None:
            return None
        name = saves.handle.get("artifact")
        try:
            if self._artifacts is None or not isinstance(name, str):
                raise NotFound(kind="artifact", name=str(name))
            record = await self._artifacts.get(name, project=self._project)
        except NotFound as error:
            reason = f"a result that is not where it says ({error.message})"
            raise ProtocolViolation(peer="The instance", reason=reason) from error
        return _handle_object(record)

    def _end(self, end: RunCompleted) -> None:
        usage = end.usage
        hooks: Json = {
            "hook_bytes_in": usage.hook_bytes_in,
            "hook_bytes_out": usage.hook_bytes_out,
            "device_s": usage.device_s,
        }
        self._result = {
            "object": "program.result",
            "id": end.run,
            "model": end.model,
            "runs": [part.to_json() for part in self._by_choice],
            "usage": usage_object([usage]) | hooks,
            "fabric": completed_object(end),
        }


def _handle_object(record: ArtifactRecord) -> Json:
    return {
        "id": record.id,
        "size": record.num_bytes,
        "expires_at": record.expires_at.isoformat(),
    }


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
