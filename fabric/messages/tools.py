"""Tools: functions that a model may ask its caller to call."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import from_json

from fabric.messages.wire import Wire

MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_DESCRIPTION_CHARS = 16_384
MAX_PARAMETERS_CHARS = 65_536
MAX_ARGUMENTS_CHARS = 1_048_576


def _as_object(text: str) -> str:
    if not isinstance(from_json(text, allow_inf_nan=False), dict):
        raise ValueError("it should be a JSON object")
    return text


ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
JsonObject = Annotated[str, AfterValidator(_as_object)]
"""JSON text of an object: the order of its keys is kept."""


class Tool(Wire):
    """A function the model may call; ``parameters`` is the schema of its arguments, as text."""

    name: ToolName
    description: str = Field(default="", max_length=MAX_DESCRIPTION_CHARS)
    parameters: JsonObject = Field(
        default='{"type": "object", "properties": {}}', max_length=MAX_PARAMETERS_CHARS
    )


class ToolCall(Wire):
    """A call the model made in an earlier turn."""

    id: str = Field(min_length=1, max_length=64)
    name: ToolName
    arguments: JsonObject = Field(max_length=MAX_ARGUMENTS_CHARS)


class ToolChoice(Wire):
    """Which calls an answer may hold.

    Of ``tools`` the template tells the model. With ``name`` the answer is that tool's arguments
    alone; with ``required`` it is a list of calls; otherwise it is text in which the model may
    write calls in the form it was trained on. ``parallel``: more than one.
    """

    tools: tuple[Tool, ...] = Field(min_length=1, max_length=MAX_TOOLS)
    name: ToolName | None = None
    required: bool = False
    parallel: bool = True


class ToolCallPart(Wire):
    """A piece of a call in an answer: the first has ``id`` and ``name``, and the arguments of all
    join to JSON. ``index`` counts the calls of the answer."""

    index: int = Field(ge=0)
    id: str | None = None
    name: str | None = None
    arguments: str = ""
