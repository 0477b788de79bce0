"""What goes to a vLLM server and what comes back: token ids both ways, never text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fabric.engine.rows import ActiveTask
from fabric.engine.sampling import Score
from fabric.engine.vllm.command import Runner
from fabric.errors import BackendFailed, RequestInvalid
from fabric.messages import Constraint, JsonSchema, Regex, Sampling, Task

Json = Mapping[str, Any]

NAME = "vLLM"
"""What errors call the server."""

ROUTES: Mapping[Runner, str] = {"generate": "/v1/completions", "pooling": "/v1/embeddings"}

_ID = "token_id:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a chunk says of one choice: its new tokens, and how it ended, if it has."""

    choice: int
    ids: Sequence[int]
    scores: Sequence[Score | None]
    finish_reason: str | None


def get_body(active: ActiveTask, served_name: str, *, stream: bool) -> dict[str, Any]:
    """Return the body of ``POST /v1/completions`` for a task, its prefix being part of the prompt.

    Args:
        active: The task, its rows holding prompt and prefix.
        served_name: What the server calls the model.
        stream: Whether tokens come as they are made; the prompt's scores come only without.
    """
    sampling = active.sampling
    body = {
        "model": served_name,
        "prompt": active.rows[0].tokens,
        "n": get_num_asked(sampling),
        "max_tokens": max(1, active.max_tokens - active.rows[0].position),
        "stream": stream,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **_get_sampling(sampling),
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if active.scores_due:
        body["prompt_logprobs"] = sampling.logprobs or 0
    body["cache_salt"] = get_salt(active.task)
    return body


def get_salt(task: Task) -> str:
    """Return what tasks must share to share prefixes; without a salt it is a task's own."""
    return task.cache_salt or f"{task.id}#{task.attempt}"


def get_num_asked(sampling: Sampling) -> int:
    """Return how many choices the server makes: greedy ones are equal, and vLLM makes only one."""
    return sampling.n if sampling.temperature else 1


def _get_sampling(sampling: Sampling) -> dict[str, Any]:
    same = {
        name: getattr(sampling, name)
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "ignore_eos"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        )
    }
    optional = {
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "logprobs": sampling.logprobs,
        "logit_bias": {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
        or None,
        "structured_outputs": _get_constraint(sampling.constraint),
    }
    return same | {name: value for name, value in optional.items() if value is not None}


def _get_constraint(constraint: Constraint | None) -> dict[str, Any] | None:
    match constraint:
        case None:
            return None
        case JsonSchema(definition=definition):
            return {"json": definition}
        case Regex(pattern=pattern):
            return {"regex": pattern}
        case _:
            return {"choice": list(constraint.texts)}


def read_event(line: str) -> Json | None:
    """Return what a line of a stream says; ``None`` for one that says nothing, or is the last.

    Raises:
        BackendFailed: It is an error, or no JSON.
    """
    kind, _, data = line.partition(":")
    if kind != "data" or data.strip() == "[DONE]":
        return None
    try:
        event = json.loads(data)
    except ValueError as error:
        raise BackendFailed(backend=NAME, reason="it sent a chunk that is no JSON") from error
    if not isinstance(event, dict) or "error" in event:
        raise BackendFailed(backend=NAME, reason=_get_message(event) or "it sent an error")
    return event


def read_steps(reply: Json, num_top: int | None) -> Iterator[Step]:
    """Yield what a chunk, or a whole reply, says of its choices.

    Args:
        reply: As the server sent it.
        num_top: How many alternatives were asked for; ``None`` for no scores at all.

    Raises:
        BackendFailed: It has no token ids.
    """
    try:
        for choice in reply["choices"]:
            ids = choice.get("token_ids") or []
            yield Step(
                choice=choice["index"],
                ids=ids,
                scores=[None] * len(ids) if num_top is None else _read_scores(choice, ids, num_top),
                finish_reason=choice.get("finish_reason"),
            )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise get_unreadable(error) from error


def _read_scores(choice: Json, ids: Sequence[int], num_top: int) -> list[Score | None]:
    logprobs = choice["logprobs"]
    scores: list[Score | None] = []
    for at in range(len(ids)):
        named = logprobs["top_logprobs"][at] or {}
        top = {int(name.removeprefix(_ID)): float(value) for name, value in named.items()}
        scores.append(_score(float(logprobs["token_logprobs"][at]), top, num_top))
    return scores


def read_prompt_scores(reply: Json, prompt: Sequence[int], num_top: int) -> list[Score | None]:
    """Return the scores of the prompt's tokens; the first has none.

    Raises:
        BackendFailed: They are not there.
    """
    try:
        scored = reply["choices"][0]["prompt_logprobs"]
        scores: list[Score | None] = [None]
        for token_id, entry in zip(prompt[1:], scored[1:], strict=True):
            top = {int(known): float(of["logprob"]) for known, of in entry.items()}
            scores.append(_score(top[token_id], top, num_top))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise get_unreadable(error) from error
    return scores


def _score(logprob: float, top: Mapping[int, float], num_top: int) -> Score:
    # The token itself is among the alternatives, whether or not it is one of the most probable.
    best = sorted(top.items(), key=lambda pair: -pair[1])[:num_top]
    return Score(logprob=logprob, top=tuple(best))


def get_refusal(status: int, text: str) -> RequestInvalid | BackendFailed:
    """Return what a task ends with that the server refused."""
    try:
        message = _get_message(json.loads(text))
    except ValueError:
        message = ""
    if status in (400, 422):
        reason = f"vLLM refuses it ({message or text[:200]})"
        return RequestInvalid(param="request", value="what was asked", reason=reason)
    return BackendFailed(backend=NAME, reason=f"it answered {status} {message}".rstrip())


def _get_message(reply: object) -> str:
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    message = error.get("message") if isinstance(error, dict) else None
    return str(message)[:300] if message else ""


def get_unreadable(error: Exception) -> BackendFailed:
    """Return what a task ends with whose answer is not as it should be."""
    return BackendFailed(backend=NAME, reason=f"its answer cannot be read ({error!r})")
