"""``POST /v1/chat/completions``: a conversation answered."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fabric.gateway.access import DirectRoute, Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.exchange import Exchange
from fabric.gateway.openai_models import ChatBody
from fabric.gateway.replies import Json, stream_reply, whole_reply
from fabric.gateway.sse import quote
from fabric.gateway.tools import as_delta, join_calls
from fabric.messages import ScoredToken, Token

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(Needs("query"))],
    route_class=DirectRoute,
)


@router.post("/chat/completions", openapi_extra=documented(ChatBody))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ChatBody)
    exchange = await Exchange.begin(request, [body.to_request()])
    shape = ChatShape(scores=bool(body.logprobs))
    if body.stream:
        return await stream_reply(
            exchange, shape, model=body.model, include_usage=body.include_usage
        )
    return await whole_reply(exchange, shape, model=body.model)


class ChatShape:
    """The ``Shape`` of chat completions; ``scores``: with log probabilities."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *, scores: bool) -> None:
        self._scores = scores

    def prompt_scored(self, run: int, tokens: Sequence[ScoredToken]) -> None:
        """Leave them out: chat completions have no place for the prompt's scores."""

    def opening(self, index: int) -> str | None:
        """Return the chunk that says whose turn it is."""
        return _chunk(index, '{"role":"assistant","content":""}')

    def token(self, index: int, token: Token) -> str:
        """Return the chunk of a token."""
        delta = f'{{"content":{quote(token.text)}}}'
        if token.tool_calls:
            content = {"content": token.text} if token.text else {}
            calls = [as_delta(part) for part in token.tool_calls]
            delta = json.dumps({**content, "tool_calls": calls})
        if not self._scores:
            return _chunk(index, delta)
        return _chunk(index, delta, json.dumps(_logprobs([token])))

    def ending(self, index: int, finish_reason: str) -> str:
        """Return the last chunk of a choice."""
        return _chunk(index, "{}", finish_reason=f'"{finish_reason}"')

    def choice(self, index: int, tokens: Sequence[Token], finish_reason: str) -> Json:
        """Return a whole choice."""
        text = "".join(token.text for token in tokens)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls := join_calls([part for token in tokens for part in token.tool_calls]):
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(tokens) if self._scores else None,
            "finish_reason": finish_reason,
        }


def _logprobs(tokens: Sequence[Token]) -> Json:
    content = [
        _scored(token.token_text, token.logprob)
        | {"top_logprobs": [_scored(top.text, top.logprob) for top in token.top_logprobs]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _scored(text: str, logprob: float | None) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _chunk(index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> str:
    return (
        f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
    )
