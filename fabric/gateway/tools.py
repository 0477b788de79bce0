"""Tools, as clients of the OpenAI API offer them and tell of their calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, PlainValidator, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from fabric.errors import RequestInvalid
from fabric.gateway.openai_fields import Body
from fabric.gateway.refusals import refusal_of
from fabric.gateway.response_format import as_text, read_constraint
from fabric.messages import Constraint, JsonSchema, Tool, ToolCall, ToolCallPart, ToolChoice
from fabric.messages.tools import MAX_TOOLS

Json = dict[str, object]


class Function(Body):
    """A function. Where an answer must call it, its parameters are followed to the letter."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolDefinition(Body):
    """One of ``tools``."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one function that must be called."""

    name: str


def _read_selection(value: object) -> str | NamedTool | None:
    match value:
        case None | "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name)}}:
            return NamedTool(name)
        case _:
            raise PydanticCustomError(
                "tool_choice",
                'it should be "none", "auto", "required" or'
                ' {"type": "function", "function": {"name": …}}',
            )


ToolSelection = Annotated[
    str | NamedTool,
    PlainValidator(_read_selection),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}),
]


class _CalledFunction(Body):
    name: str
    arguments: str


class CalledTool(Body):
    """One of a turn's ``tool_calls``."""

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction

    @model_validator(mode="after")
    def _is_a_call(self) -> Self:
        try:
            self.to_call()
        except ValidationError as error:
            [first, *_] = error.errors()
            raise PydanticCustomError(
                "tool_call",
                "the call {id} has a bad {field}: {reason}",
                {
                    "id": self.id[:64],
                    "field": ".".join(map(str, first["loc"])),
                    "reason": first["msg"].removeprefix("Value error, "),
                },
            ) from None
        return self

    def to_call(self) -> ToolCall:
        """Return the call.

        Raises:
            ValidationError: Its name or id is none, or its arguments are no JSON object.
        """
        return ToolCall(
            id=self.id, name=self.function.name, arguments=self.function.arguments or "{}"
        )


def read_choice(
    tools: Sequence[ToolDefinition],
    mode: str | NamedTool | None,
    *,
    parallel: bool,
) -> ToolChoice | None:
    """Return which calls an answer may hold; ``None`` where it may hold none.

    Raises:
        RequestInvalid: Tools are too many or too large, two have one name, or the one that must be
            called is not among them.
    """
    names = [tool.function.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RequestInvalid(param="tools", value=twice[0], reason="two tools have this name")
    wanted = mode.name if isinstance(mode, NamedTool) else None
    if wanted is not None and wanted not in names:
        raise RequestInvalid(param="tool_choice", value=wanted, reason="no tool has this name")
    if mode == "required" and not names:
        raise RequestInvalid(param="tool_choice", value=mode, reason="it needs tools")
    if mode == "none" or not names:
        return None
    if len(tools) > MAX_TOOLS:
        raise RequestInvalid(
            param="tools", value=f"{len(tools)} tools", reason=f"there may be {MAX_TOOLS}"
        )
    return ToolChoice(
        tools=tuple(_to_tool(tool, index) for index, tool in enumerate(tools)),
        name=wanted,
        required=mode == "required",
        parallel=parallel,
    )


def _to_tool(definition: ToolDefinition, index: int) -> Tool:
    """Return a tool; without parameters it takes no arguments."""
    function = definition.function
    given: dict[str, object] = {"name": function.name}
    if function.description is not None:
        given["description"] = function.description
    if function.parameters is not None:
        given["parameters"] = as_text(function.parameters)
    try:
        return Tool.model_validate(given)
    except ValidationError as error:
        raise refusal_of(error, within=f"tools[{index}].function") from None


def constraint_of(choice: ToolChoice) -> Constraint | None:
    """Return what an answer must be that has to hold calls.

    Raises:
        RequestInvalid: The schemas of all tools together are too large.
    """
    schemas: list[Json] = [json.loads(tool.parameters) for tool in choice.tools]
    if choice.name is not None:
        [schema] = [s for s, t in zip(schemas, choice.tools, strict=True) if t.name == choice.name]
        return read_constraint("tools", JsonSchema, definition=as_text(_of_object(schema)))
    if not choice.required:
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "parameters": _moved(
                    _of_object(schema), f"#/items/anyOf/{index}/properties/parameters"
                ),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, (tool, schema) in enumerate(zip(choice.tools, schemas, strict=True))
    ]
    most = {} if choice.parallel else {"maxItems": 1}
    listed: Json = {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}
    return read_constraint("tools", JsonSchema, definition=as_text(listed))


def join_calls(parts: Sequence[ToolCallPart]) -> list[Json]:
    """Return the calls of a whole answer, put together from their pieces."""
    calls: list[dict[str, str]] = []
    for part in parts:
        if part.name is not None:
            calls.append({"id": part.id or "", "name": part.name, "arguments": ""})
        calls[-1]["arguments"] += part.arguments
    return [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in calls
    ]


def as_delta(part: ToolCallPart) -> Json:
    """Return a piece of a call as streams have it."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {
        "index": part.index,
        "id": part.id,
        "type": "function",
        "function": {"name": part.name, "arguments": part.arguments},
    }


def _of_object(schema: Json) -> Json:
    """Return the schema, which says that arguments are an object even if it does not."""
    return schema if "type" in schema else {"type": "object", **schema}


def _moved(node: object, to: str) -> object:
    """Return a schema whose references to itself still hold when it stands at ``to``."""
    if isinstance(node, list):
        return [_moved(item, to) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: to + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, to)
        for key, value in node.items()
    }
