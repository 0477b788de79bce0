"""``POST /v1/completions``: a text continued, with echo and log probabilities for harnesses."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fabric.gateway.access import DirectRoute, Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.exchange import Exchange
from fabric.gateway.openai_models import CompletionBody
from fabric.gateway.replies import Json, stream_reply, whole_reply
from fabric.gateway.sse import quote
from fabric.messages import ScoredToken, TextInput, Token

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(Needs("query"))],
    route_class=DirectRoute,
)


@router.post("/completions", openapi_extra=documented(CompletionBody))
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    body = await read_body(request, CompletionBody)
    exchange = await Exchange.begin(request, list(body.requests()))
    shape = CompletionShape(body)
    if body.stream:
        return await stream_reply(
            exchange, shape, model=body.model, include_usage=body.include_usage
        )
    return await whole_reply(exchange, shape, model=body.model)


class CompletionShape:
    """The ``Shape`` of completions."""

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, body: CompletionBody) -> None:
        self._prompts = body.prompt
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._scores = body.logprobs is not None
        self._alternatives = bool(body.logprobs)
        self._scored: dict[int, Sequence[ScoredToken]] = {}
        self._num_chars: defaultdict[int, int] = defaultdict(int)
        """How much of each streamed choice has been sent: where its next token begins."""

    def prompt_scored(self, run: int, tokens: Sequence[ScoredToken]) -> None:
        """Keep the scores of a prompt that is to be echoed."""
        self._scored[run] = tokens

    def opening(self, index: int) -> str | None:
        """Return the echoed prompt."""
        if not self._echo:
            return None
        run = index // self._n
        prompt = self._prompt_text(run)
        self._num_chars[index] = len(prompt)
        logprobs = json.dumps(self._logprobs(self._scored[run], ())) if self._scores else "null"
        return _chunk(index, prompt, logprobs)

    def token(self, index: int, token: Token) -> str:
        """Return the chunk of a token."""
        if not self._scores:
            return _chunk(index, token.text, "null")
        logprobs = self._logprobs((), [token], self._num_chars[index])
        self._num_chars[index] += len(token.text)
        return _chunk(index, token.text, json.dumps(logprobs))

    def ending(self, index: int, finish_reason: str) -> str:
        """Return the last chunk of a choice."""
        return _chunk(index, "", "null", f'"{finish_reason}"')

    def choice(self, index: int, tokens: Sequence[Token], finish_reason: str) -> Json:
        """Return a whole choice."""
        run = index // self._n
        prompt = self._prompt_text(run) if self._echo else ""
        scored = self._scored.get(run, ())
        return {
            "index": index,
            "text": prompt + "".join(token.text for token in tokens),
            "logprobs": self._logprobs(scored, tokens, len(prompt)) if self._scores else None,
            "finish_reason": finish_reason,
        }

    def _prompt_text(self, run: int) -> str:
        prompt = self._prompts[run]
        if isinstance(prompt, TextInput):
            return prompt.text
        return "".join(token.text for token in self._scored[run])

    def _logprobs(
        self, prompt: Sequence[ScoredToken], tokens: Sequence[Token], start: int = 0
    ) -> Json:
        """Return the log probabilities of prompt tokens, and of tokens that begin at ``start``.

        ``token_ids`` are ours: whoever names tokens by their ids learns them here.
        """
        scored = [(token.text, token) for token in prompt]
        generated = [(token.token_text, token) for token in tokens]
        both: list[tuple[str, ScoredToken | Token]] = [*scored, *generated]
        return {
            "tokens": [text for text, _ in both],
            "token_ids": [token.token_id for _, token in both],
            "token_logprobs": [token.logprob for _, token in both],
            "top_logprobs": [_top(*pair) for pair in both] if self._alternatives else None,
            "text_offset": [*_offsets(prompt, 0), *_offsets(tokens, start)],
        }


def _offsets(tokens: Sequence[ScoredToken] | Sequence[Token], start: int) -> Iterator[int]:
    for token in tokens:
        yield start
        start += len(token.text)


def _top(text: str, token: ScoredToken | Token) -> dict[str, float] | None:
    """Return the most likely tokens there and the one that was taken; none for the very first."""
    if token.logprob is None:
        return None
    top = {alternative.text: alternative.logprob for alternative in token.top_logprobs}
    return top | {text: top.get(text, token.logprob)}


def _chunk(index: int, text: str, logprobs: str, finish_reason: str = "null") -> str:
    return (
        f'{{"index":{index},"text":{quote(text)},"logprobs":{logprobs},'
        f'"finish_reason":{finish_reason}}}'
    )
