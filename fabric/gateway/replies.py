"""From the events of runs to the replies of the OpenAI API, streamed or whole."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from starlette.responses import Response

from fabric.gateway.exchange import Exchange
from fabric.gateway.refusals import error_object
from fabric.gateway.sse import DONE, EventStream, frame, quote
from fabric.messages import (
    Placed,
    PromptScored,
    RunCompleted,
    RunFailed,
    ScoredToken,
    Token,
    Usage,
)

Json = dict[str, object]


class Shape(Protocol):
    """How one route spells its choices. ``index`` counts the choices of the whole reply.

    A streamed choice is an opening, a chunk a token, and an ending, each one JSON object as text.
    """

    id_prefix: str
    object: str
    chunk_object: str

    def prompt_scored(self, run: int, tokens: Sequence[ScoredToken]) -> None:
        """Take the scores of a run's prompt; they come before its tokens."""

    def opening(self, index: int) -> str | None:
        """Return what comes before a choice's first token, if anything."""

    def token(self, index: int, token: Token) -> str:
        """Return the chunk of a token."""

    def ending(self, index: int, finish_reason: str) -> str:
        """Return what says why a choice ended."""

    def choice(self, index: int, tokens: Sequence[Token], finish_reason: str) -> Json:
        """Return a whole choice."""


async def stream_reply(
    exchange: Exchange, shape: Shape, *, model: str, include_usage: bool
) -> Response:
    """Return the streamed reply once its first token is there.

    Raises:
        FabricError: The run failed before that.
    """
    stream = _Stream(exchange, shape, model=model, include_usage=include_usage)
    chunks = stream.chunks()
    first = await anext(chunks)
    return EventStream(first, chunks, {"x-fabric-site": stream.site})


async def whole_reply(exchange: Exchange, shape: Shape, *, model: str) -> Response:
    """Return the reply once all runs are done.

    Raises:
        FabricError: A run failed; the others are cancelled.
    """
    body, site = await whole_body(exchange, shape, model=model)
    return Response(
        json.dumps(body), headers={"x-fabric-site": site}, media_type="application/json"
    )


async def whole_body(exchange: Exchange, shape: Shape, *, model: str) -> tuple[Json, str]:
    """Return the reply's body once all runs are done, and the site of the first.

    Raises:
        FabricError: A run failed; the others are cancelled.
    """
    n = exchange.requests[0].sampling.n
    tokens: list[list[Token]] = [[] for _ in range(n * len(exchange.runs))]
    ends: list[RunCompleted] = []
    async with exchange:
        async for run, event in exchange.events():
            match event:
                case Token():
                    tokens[run * n + event.choice].append(event)
                case PromptScored():
                    shape.prompt_scored(run, event.tokens)
                case RunCompleted():
                    ends.append(event)
                case RunFailed():
                    raise event.failure.to_error()
    body = {
        "id": _reply_id(exchange, shape),
        "object": shape.object,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": ends[0].digest,
        "choices": [
            shape.choice(run * n + choice, tokens[run * n + choice], reason)
            for run, end in enumerate(ends)
            for choice, reason in enumerate(end.finish_reasons)
        ],
        "usage": usage_object([end.usage for end in ends]),
        "fabric": _whole_object(ends),
    }
    return body, ends[0].site


class _Stream:
    """One streamed reply: what is constant in its chunks is put together once."""

    def __init__(
        self, exchange: Exchange, shape: Shape, *, model: str, include_usage: bool
    ) -> None:
        self.site = ""
        self._exchange = exchange
        self._shape = shape
        self._include_usage = include_usage
        self._model = model
        self._head = ""
        self._tail = ',"usage":null' if include_usage else ""
        self._num_choices = exchange.requests[0].sampling.n
        self._opened: set[int] = set()
        self._news: Json | None = None
        """What the next chunk says in its ``fabric`` object."""

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the events, several of which may come as one piece.

        Raises:
            FabricError: A run failed before anything was yielded.
        """
        ends: list[RunCompleted] = []
        pieces: list[bytes] = []
        async with self._exchange as exchange:
            async for run, event in exchange.events():
                match event:
                    case Token():
                        pieces.append(self._token(run, event))
                    case Placed():
                        self._place(exchange.runs[run].id, event)
                    case PromptScored():
                        self._shape.prompt_scored(run, event.tokens)
                    case RunCompleted():
                        ends.append(event)
                        pieces += self._endings(run, event)
                    case RunFailed():
                        if not (self._opened or ends):
                            raise event.failure.to_error()
                        yield b"".join((*pieces, _broken(event)))
                        return
                is_last = len(ends) == len(exchange.runs)
                if pieces and not (exchange.has_more or is_last):
                    yield b"".join(pieces)
                    pieces.clear()
        last = DONE
        if self._include_usage:
            usage = json.dumps(usage_object([end.usage for end in ends]))
            ours = json.dumps(_whole_object(ends))
            last = frame(f'{self._head}],"usage":{usage},"fabric":{ours}}}') + DONE
        yield b"".join((*pieces, last))

    def _place(self, run_id: str, event: Placed) -> None:
        self.site = event.placement.site
        self._news = _placed_object(run_id, event)
        self._head = self._head or (
            f'{{"id":{quote(_reply_id(self._exchange, self._shape))},'
            f'"object":"{self._shape.chunk_object}","created":{int(time.time())},'
            f'"model":{quote(self._model)},'
            f'"system_fingerprint":{quote(event.placement.digest)},"choices":['
        )

    def _token(self, run: int, token: Token) -> bytes:
        index = run * self._num_choices + token.choice
        opening = b"" if index in self._opened else self._opening(index)
        return opening + self._chunk(self._shape.token(index, token))

    def _opening(self, index: int) -> bytes:
        self._opened.add(index)
        opening = self._shape.opening(index)
        return b"" if opening is None else self._chunk(opening)

    def _endings(self, run: int, end: RunCompleted) -> list[bytes]:
        pieces = []
        for choice, reason in enumerate(end.finish_reasons):
            index = run * self._num_choices + choice
            if index not in self._opened:
                pieces.append(self._opening(index))
            if choice == len(end.finish_reasons) - 1:
                self._news = completed_object(end)
            pieces.append(self._chunk(self._shape.ending(index, reason)))
        return pieces

    def _chunk(self, choice: str) -> bytes:
        if self._news is None:
            return frame(f"{self._head}{choice}]{self._tail}}}")
        ours, self._news = json.dumps(self._news), None
        return frame(f'{self._head}{choice}]{self._tail},"fabric":{ours}}}')


def _broken(event: RunFailed) -> bytes:
    """Return the end of a stream that broke: no ``[DONE]`` follows it."""
    ours = {"run": event.run, "charge_usu": event.charge_usu}
    error = error_object(event.failure.to_error())
    return frame(json.dumps({"error": error, "fabric": ours}))


def _reply_id(exchange: Exchange, shape: Shape) -> str:
    return f"{shape.id_prefix}-{exchange.runs[0].id.removeprefix('run_')}"


def _placed_object(run_id: str, event: Placed) -> Json:
    placement = event.placement
    because = {} if event.because is None else {"because": event.because}
    return {
        "run": run_id,
        "site": placement.site,
        "instance": placement.instance,
        "digest": placement.digest,
        "attempts": event.attempt,
        "reason": placement.reason,
        **because,
    }


def completed_object(end: RunCompleted) -> Json:
    """Return the ``fabric`` object of a run that was answered."""
    adapter = {} if end.adapter is None else {"adapter": end.adapter}
    return {
        "run": end.run,
        "site": end.site,
        "instance": end.instance,
        "digest": end.digest,
        "model": end.model,
        **adapter,
        "attempts": end.attempts,
        "charge_usu": end.charge_usu,
        "reason": end.placement.reason,
        "first_token_s": end.first_token_s,
        "total_s": end.total_s,
    }


def _whole_object(ends: Sequence[RunCompleted]) -> Json:
    """Return the ``fabric`` object of a whole reply: of its run, or of all with their sum."""
    if len(ends) == 1:
        return completed_object(ends[0])
    return {
        "runs": [completed_object(end) for end in ends],
        "charge_usu": sum(end.charge_usu for end in ends),
    }


def usage_object(usages: Sequence[Usage]) -> Json:
    """Return OpenAI's ``usage`` of one or several runs."""
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    output_tokens = sum(usage.output_tokens for usage in usages)
    cached_tokens = sum(usage.cached_prompt_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
