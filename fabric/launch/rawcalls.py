"""Raw calls: requests as plain objects, for users who call ``infer`` without our SDK.

An item is ``{"prompt": …}`` or ``{"messages": […]}`` with the fields of ``Sampling`` and of
``Request`` beside it, or a ``Request`` itself. A result is ``{"text", "finish_reason", "usage"}``,
with ``choices`` if several were asked for, or ``{"error": {"code", "message"}}``; that of a program
has its ``runs``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fabric.errors import FabricError, RequestInvalid, UnknownParameter
from fabric.messages import (
    Event,
    Failed,
    Finished,
    Program,
    ProgramInput,
    Request,
    Sampling,
    Saves,
    Token,
    new_id,
)

_SAMPLING = frozenset(Sampling.model_fields)


def get_request(item: Mapping[str, Any], *, id: str, model: str | None) -> Request:
    """Return an item as a request.

    Args:
        item: What the user sent.
        id: The request's id, unless the item is a request with one of its own.
        model: The batch's model, which the item may repeat.

    Raises:
        RequestInvalid: A field is missing, wrong or unknown.
    """
    fields: dict[str, Any] = {"id": id, "model": model, **item}
    if model is not None and fields["model"] != model:
        reason = f"the batch is for {model!r}; send one batch a model"
        raise RequestInvalid(param="model", value=fields["model"], reason=reason)
    if is_flat := "input" not in fields:
        fields["sampling"] = {name: fields.pop(name) for name in _SAMPLING & fields.keys()}
        if isinstance(fields["sampling"].get("stop"), str):
            fields["sampling"]["stop"] = (fields["sampling"]["stop"],)
        fields["input"] = _get_input(fields)
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error, is_flat) from None


def get_id(task_id: str | None, index: int) -> str:
    """Return the id of an item's run.

    Globus Compute may deliver a task again: the same item has the same id then, so that it is
    charged once.

    Args:
        task_id: The Globus Compute task that brought the batch, if one did.
        index: The item's place in the batch.
    """
    if task_id is None:
        return new_id("run")
    return f"run_{uuid.uuid5(uuid.NAMESPACE_OID, f'{task_id}/{index}').hex}"


def as_item(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a program and its options as an item."""
    asked = {"kind": "program", "program": fields["program"]}
    options = {name: value for name, value in fields.items() if name != "program"}
    return {"mode": "program", "input": asked, "sampling": {"max_tokens": 0}, **options}


def get_result(events: Sequence[Event], request: Request) -> dict[str, Any]:
    """Return what a user wants to know of a task that has ended."""
    last = events[-1]
    if isinstance(last, Failed):
        return get_error(last.failure.to_error())
    assert isinstance(last, Finished)
    if isinstance(request.input, ProgramInput):
        usage = last.usage.model_dump(mode="json")
        return {"runs": _get_runs(events, request.input.program), "usage": usage}
    texts = [""] * len(last.finish_reasons)
    for event in events:
        if isinstance(event, Token):
            texts[event.choice] += event.text
    choices = [
        {"text": text, "finish_reason": reason}
        for text, reason in zip(texts, last.finish_reasons, strict=True)
    ]
    result = {**choices[0], "usage": last.usage.model_dump(mode="json")}
    return result if len(choices) == 1 else {**result, "choices": choices}


def get_error(error: FabricError) -> dict[str, Any]:
    """Return the result of an item that failed."""
    return {"error": {"code": error.code, "message": error.message}}


def _get_runs(events: Sequence[Event], program: Program) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = [{"id": run.id, "tokens": [], "text": ""} for run in program.runs]
    by_id = {run["id"]: run for run in runs}
    for event in events:
        if isinstance(event, Token):
            runs[event.choice]["tokens"].append(event.token_id)
            runs[event.choice]["text"] += event.text
        elif isinstance(event, Saves):
            told = event.model_dump(include={"step", "names", "size", "data", "handle"})
            by_id[event.run].setdefault("saves", []).append(told)
    return runs


def _get_input(fields: dict[str, Any]) -> dict[str, Any]:
    given = [name for name in ("prompt", "messages") if name in fields]
    if len(given) != 1:
        reason = "an item has either a prompt or messages"
        raise RequestInvalid(param="prompt", value=given, reason=reason)
    value = fields.pop(given[0])
    match given[0], value:
        case "messages", _:
            return {"kind": "chat", "messages": value}
        case _, str():
            return {"kind": "text", "text": value}
        case _, list():
            return {"kind": "tokens", "ids": value}
    raise RequestInvalid(param="prompt", value=value, reason="it is a string or token ids")


def _invalid(error: ValidationError, is_flat: bool) -> RequestInvalid:
    first = error.errors(include_url=False, include_context=False)[0]
    path = first["loc"]
    if is_flat:  # the user wrote max_tokens, and not sampling.max_tokens
        path = path[{"sampling": 1, "input": 2}.get(str(path[0]), 0) :]
    where = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return UnknownParameter(param=where)
    return RequestInvalid(param=where, value=first["input"], reason=first["msg"])
