"""What an answer must be: JSON of a schema, text that a regular expression matches, or a choice."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fabric.messages.wire import Wire

MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 4_096
MAX_TEXTS = 256
MAX_TEXT_CHARS = 1_024


class JsonSchema(Wire):
    """The answer is JSON that the schema accepts.

    ``definition`` is the schema as JSON text: the order of its properties is that of the answer's.
    """

    kind: Literal["json_schema"] = "json_schema"
    definition: str = Field(min_length=1, max_length=MAX_SCHEMA_CHARS)


class Regex(Wire):
    """The whole answer matches ``pattern``, in the syntax of Rust's ``regex`` (no look-around)."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, max_length=MAX_REGEX_CHARS)


class Choices(Wire):
    """The answer is one of ``texts``."""

    kind: Literal["choices"] = "choices"
    texts: tuple[Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)], ...] = Field(
        min_length=1, max_length=MAX_TEXTS
    )


Constraint = JsonSchema | Regex | Choices
