"""What an answer must be, as clients of the OpenAI API say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fabric.gateway.openai_fields import Body
from fabric.gateway.refusals import refusal_of
from fabric.messages import Choices, Constraint, JsonSchema, Regex


class NamedSchema(Body):
    """A schema. It is followed to the letter, ``strict`` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    definition: Annotated[dict[str, object], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(Body):
    """``response_format``: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_the_schema_it_needs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "response_format", 'json_schema belongs to the type "json_schema", and only there'
            )
        return self

    def to_constraint(self) -> Constraint | None:
        """Return what the answer must be.

        Raises:
            RequestInvalid: The schema is too large.
        """
        if self.type == "text":
            return None
        schema = self.json_schema.definition if self.json_schema else {"type": "object"}
        return read_constraint("response_format", JsonSchema, definition=as_text(schema))


def read_constraint(
    param: str, model: type[JsonSchema | Regex | Choices], **fields: object
) -> Constraint:
    """Return the constraint that the parameter ``param`` asks for.

    Raises:
        RequestInvalid: It is empty or too large.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise refusal_of(error, rename=dict.fromkeys(fields, param)) from None


def as_text(schema: Mapping[str, object]) -> str:
    """Return a schema as JSON text; the order of its properties is kept."""
    return json.dumps(schema, ensure_ascii=False)
