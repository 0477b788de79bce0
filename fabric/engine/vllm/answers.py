"""One task over a vLLM server: asked by token ids, told in the engine's own events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx

from fabric.engine.batch import tell
from fabric.engine.reports import Reports
from fabric.engine.rows import ActiveTask, Row
from fabric.engine.sampling import Score
from fabric.engine.vllm import embeddings
from fabric.engine.vllm.protocol import (
    NAME,
    ROUTES,
    Json,
    Step,
    get_body,
    get_num_asked,
    get_refusal,
    get_salt,
    get_unreadable,
    read_event,
    read_prompt_scores,
    read_steps,
)
from fabric.errors import BackendFailed, RequestCancelled
from fabric.messages import Event
from fabric.messages.events import FinishReason


class Answers:
    """Runs tasks on a server.

    Args:
        http: A client of the server.
        reports: Makes events.
        served_name: What the server calls the model.
        dimensions: Of its embeddings.
    """

    def __init__(
        self, http: httpx.AsyncClient, reports: Reports, *, served_name: str, dimensions: int
    ) -> None:
        self._http = http
        self._reports = reports
        self._served_name = served_name
        self._dimensions = dimensions

    async def run(self, active: ActiveTask) -> None:
        """Tell a task's events up to its last token.

        Raises:
            FabricError: The server refused it or did not answer it whole.
        """
        try:
            if active.embeds:
                await self._embed(active)
            elif active.scores_due:
                await self._run_whole(active)
            else:
                await self._run_streamed(active)
        except httpx.HTTPError as error:
            reason = f"the connection to it failed ({str(error) or type(error).__name__})"
            raise BackendFailed(backend=NAME, reason=reason) from error
        if not active.finished:
            raise BackendFailed(backend=NAME, reason="its answer ended before it was complete")

    async def _run_streamed(self, active: ActiveTask) -> None:
        going_on = set(range(get_num_asked(active.sampling)))
        async with aclosing(self._stream(get_body(active, self._served_name, stream=True))) as all:
            async for reply in all:
                going_on -= self._take(active, reply)
                # Where we have enough, the server is left; where it ended, its usage comes last.
                if active.finished and (going_on or reply.get("usage")):
                    break

    async def _run_whole(self, active: ActiveTask) -> None:
        """Ask for the prompt's scores, which a stream does not carry, and the tokens with them."""
        body = get_body(active, self._served_name, stream=False)
        reply = await self._post(ROUTES["generate"], body)
        num_top = active.sampling.logprobs or 0
        active.scores = read_prompt_scores(reply, active.prompt, num_top)
        self._tell(active, self._reports.prompt_scored(active))
        active.scores, active.scored = [], True
        if active.max_tokens == 0:
            active.end_empty()
        else:
            self._take(active, reply)

    async def _embed(self, active: ActiveTask) -> None:
        salt = get_salt(active.task)
        body = embeddings.get_body(active.prompt, self._served_name, salt=salt)
        active.hidden_H = embeddings.read_vector(
            await self._post(ROUTES["pooling"], body),
            num_tokens=len(active.prompt),
            dimensions=self._dimensions,
        )
        self._tell(active, self._reports.embedding(active))
        active.end_empty()

    async def _post(self, route: str, body: Json) -> Json:
        response = await self._http.post(route, json=body)
        if response.is_error:
            raise get_refusal(response.status_code, response.text)
        try:
            reply: Json = response.json()
        except ValueError as error:
            raise get_unreadable(error) from error
        return reply

    async def _stream(self, body: Json) -> AsyncGenerator[Json, None]:
        async with self._http.stream("POST", ROUTES["generate"], json=body) as response:
            if response.is_error:
                await response.aread()
                raise get_refusal(response.status_code, response.text)
            async for line in response.aiter_lines():
                if (event := read_event(line)) is not None:
                    yield event

    def _take(self, active: ActiveTask, reply: Json) -> set[int]:
        """Tell what a reply says; return the choices that the server has ended."""
        ended = set()
        for step in read_steps(reply, active.sampling.logprobs):
            num_asked = get_num_asked(active.sampling)
            if not 0 <= step.choice < num_asked:
                raise BackendFailed(backend=NAME, reason=f"it sent a choice {step.choice}")
            for row in active.rows[step.choice :: num_asked]:
                self._advance(active, row, step)
            if step.finish_reason:
                ended.add(step.choice)
        cached = ((reply.get("usage") or {}).get("prompt_tokens_details") or {}).get(
            "cached_tokens"
        )
        if cached:
            found = min(int(cached), len(active.prompt))
            active.usage = active.usage.model_copy(update={"cached_prompt_tokens": found})
        return ended

    def _advance(self, active: ActiveTask, row: Row, step: Step) -> None:
        pairs: list[tuple[int, Score | None]] = list(zip(step.ids, step.scores, strict=True))
        for at, (token_id, score) in enumerate(pairs):
            if row.finish_reason is not None:
                return  # the server goes on until it hears that we have enough
            text = row.append(token_id)
            if row.finish_reason is None and step.finish_reason and at == len(pairs) - 1:
                text += row.stream.flush()
                row.finish_reason = _reason(step.finish_reason, has_calls=row.stream.has_calls)
            num_output = active.usage.output_tokens + 1
            active.usage = active.usage.model_copy(update={"output_tokens": num_output})
            self._tell(active, self._reports.token(row, text, score))

    def _tell(self, active: ActiveTask, event: Event) -> None:
        if not tell(active.sink, event):
            raise RequestCancelled


def _reason(given: str, *, has_calls: bool) -> FinishReason:
    match given:
        case "length":
            return "length"
        case "stop":
            return "tool_calls" if has_calls else "stop"
        case _:
            raise BackendFailed(backend=NAME, reason=f"it ended a choice by {given!r}")
