"""The fields of the OpenAI API that come in several forms, each read into one."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from fabric.messages import TextInput, TokensInput

MAX_TEXTS = 2048
"""The most texts of one request for embeddings, as at OpenAI."""
MAX_PROMPTS = 128
"""The most prompts one completion request may carry; each is a run of its own."""


class Body(BaseModel):
    """The base of every body the gateway reads: closed, strict and without NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def neutral(*values: object) -> AfterValidator:
    """Return a validator that lets only ``values`` (and null) through."""

    def check(value: object) -> object:
        if value is None or value in values:
            return value
        raise PydanticCustomError(
            "unsupported",
            "this is not supported here; leave it out, or send {neutral}",
            {"neutral": json.dumps(values[0] if values else None)},
        )

    return AfterValidator(check)


def _read_prompts(value: object, most: int = MAX_PROMPTS) -> tuple[TextInput | TokensInput, ...]:
    """Return one input a prompt: of a string, a list of strings, token ids, or lists of them."""
    match value:
        case str():
            return (TextInput(text=value),)
        case [str(), *_] if all(type(item) is str for item in value):
            inputs: tuple[TextInput | TokensInput, ...] = tuple(TextInput(text=t) for t in value)
        case [int(), *_] if _are_token_ids(value):
            return (TokensInput.model_validate({"ids": value}),)
        case [[int(), *_], *_] if all(_are_token_ids(item) for item in value):
            inputs = tuple(TokensInput.model_validate({"ids": ids}) for ids in value)
        case _:
            raise PydanticCustomError(
                "prompt",
                "it should be a string, a list of strings, a list of token ids (whole numbers from"
                " 0), or a list of such lists, and not be empty",
            )
    if len(inputs) > most:
        raise PydanticCustomError(
            "prompt", "it holds more than {limit} prompts; send fewer", {"limit": most}
        )
    return inputs


def _are_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def _read_stop(value: object) -> object:
    match value:
        case str():
            return (value,)
        case list() if all(isinstance(item, str) for item in value):
            return tuple(value)
        case None:
            return None
        case _:
            raise PydanticCustomError("stop", "it should be a string or a list of strings")


def _read_content(value: object) -> str:
    """Return the text of a message: a string, or the joined parts of type ``text``."""
    if isinstance(value, str):
        return value
    texts: list[str] = []
    for part in value if isinstance(value, list) else [None]:
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                texts.append(text)
            case _:
                raise PydanticCustomError(
                    "content",
                    'it should be a string, or a list of parts {"type": "text", "text": …}',
                )
    return "\n".join(texts)


def _schema_of_prompts(most: int) -> WithJsonSchema:
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    texts = {"type": "array", "items": {"type": "string"}, "maxItems": most}
    several = {"type": "array", "items": ids, "maxItems": most}
    return WithJsonSchema({"anyOf": [{"type": "string"}, texts, ids, several]})


Prompts = Annotated[
    tuple[TextInput | TokensInput, ...],
    PlainValidator(_read_prompts),
    _schema_of_prompts(MAX_PROMPTS),
]
InputTexts = Annotated[
    tuple[TextInput | TokensInput, ...],
    PlainValidator(partial(_read_prompts, most=MAX_TEXTS)),
    _schema_of_prompts(MAX_TEXTS),
]
Content = Annotated[
    str,
    PlainValidator(_read_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]
Stop = Annotated[tuple[str, ...] | None, BeforeValidator(_read_stop)]
