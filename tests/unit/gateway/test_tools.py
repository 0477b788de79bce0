"""How tools and calls of the OpenAI API become a request, and how bad ones are refused."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from pydantic import ValidationError

from fabric.errors import FabricError, RequestInvalid, UnknownParameter
from fabric.gateway.openai_models import ChatBody
from fabric.gateway.refusals import refusal_of
from fabric.gateway.tools import as_delta, join_calls
from fabric.messages import ChatInput, JsonSchema, Request, Tool, ToolCall, ToolCallPart

SCHEMA = {"type": "object", "properties": {"z": {}, "a": {"const": "é"}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
NAMED = {"type": "function", "function": {"name": "add"}}
USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> Request:
    body = {"model": "m", "messages": [USER], **fields}
    return ChatBody.model_validate_json(json.dumps(body)).to_request()


def chat_input(**fields: Any) -> ChatInput:
    request = chat(**fields)
    assert isinstance(request.input, ChatInput)
    return request.input


def definition(**fields: Any) -> Any:
    constraint = chat(**fields).sampling.constraint
    assert isinstance(constraint, JsonSchema)
    return json.loads(constraint.definition)


def call(arguments: object = '{"a": 1}', **changes: object) -> dict[str, object]:
    function = {"name": "add", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **changes}


def test_offered_tools_arrive_with_their_properties_in_order() -> None:
    choice = chat_input(tools=[ADD, NOW]).tool_choice
    assert choice is not None
    parameters = json.dumps(SCHEMA, ensure_ascii=False)
    assert choice.tools == (
        Tool(name="add", parameters=parameters),
        Tool(name="now", description="The time."),
    )
    assert (choice.name, choice.required, choice.parallel) == (None, False, True)
    assert chat(tools=[ADD]).sampling.constraint is None
    assert chat_input(tools=[ADD], tool_choice="none").tool_choice is None
    assert chat_input(tools=[]).tool_choice is None


def test_a_named_tool_must_be_called_with_arguments_of_its_schema() -> None:
    choice = chat_input(tools=[ADD, NOW], tool_choice=NAMED).tool_choice
    assert choice is not None
    assert choice.name == "add"
    assert definition(tools=[ADD, NOW], tool_choice=NAMED) == SCHEMA


def test_required_calls_are_a_list_of_any_of_the_tools() -> None:
    listed = definition(tools=[ADD, NOW], tool_choice="required")
    assert listed["minItems"] == 1
    assert "maxItems" not in listed
    names = [item["properties"]["name"] for item in listed["items"]["anyOf"]]
    assert names == [{"const": "add"}, {"const": "now"}]
    one = definition(tools=[ADD], tool_choice="required", parallel_tool_calls=False)
    assert one["maxItems"] == 1


def test_references_in_a_schema_still_hold_inside_the_list() -> None:
    nested = {
        "type": "object",
        "properties": {"c": {"$ref": "#/$defs/C"}},
        "required": ["c"],
        "$defs": {"C": {"enum": ["x", "y"]}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": nested}}
    listed = definition(tools=[NOW, tool], tool_choice="required")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(listed))
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""
    broken = json.dumps(listed).replace("anyOf/1", "anyOf/7")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(broken)
    assert llguidance.LLMatcher.validate_grammar(grammar) != ""


def test_earlier_calls_and_their_results_arrive() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call()]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    _, called, result = chat_input(messages=turns).messages
    assert called.tool_calls == (ToolCall(id="call_1", name="add", arguments='{"a": 1}'),)
    assert (result.role, result.content, result.tool_call_id) == ("tool", "3", "call_1")


def test_the_bound_of_the_prompt_counts_tools_and_calls() -> None:
    plain = chat().prompt_tokens_bound()
    offered = chat(tools=[ADD]).prompt_tokens_bound()
    assert offered >= plain + len(json.dumps(SCHEMA, indent=4))
    turn = {"role": "assistant", "content": None, "tool_calls": [call('{"a": "%s"}' % ("x" * 999))]}
    assert chat(messages=[USER, turn]).prompt_tokens_bound() > plain + 999


def function(**fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [function(name="two words")]}, "tools[0].function.name"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(), function()]}, "tools"),
        ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [function(description="x" * 20_000)]}, "tools[0].function.description"),
        ({"tools": [function(parameters={"a": "x" * 70_000})]}, "tools[0].function.parameters"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [ADD], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (
            {
                "tools": [ADD],
                "tool_choice": NAMED,
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
        ({"messages": [{"role": "tool", "content": "3"}]}, "messages[0].tool_call_id"),
        ({"messages": [USER | {"tool_call_id": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [USER | {"tool_calls": [call()]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        *(
            (
                {"messages": [{"role": "assistant", "tool_calls": [bad]}]},
                "messages[0].tool_calls[0]",
            )
            for bad in (
                call("{"),
                call("[1]"),
                call('{"a": NaN}'),
                call('{"a":' * 5000),
                call(id=""),
            )
        ),
    ],
)
def test_bad_tools_are_named_with_a_remedy(fields: dict[str, object], param: str) -> None:
    with pytest.raises((ValidationError, FabricError)) as caught:
        chat(**fields)
    error = caught.value
    told = refusal_of(error) if isinstance(error, ValidationError) else error
    assert isinstance(told, RequestInvalid)
    assert told.detail["param"] == param
    assert len(told.message) < 400


def test_unknown_fields_of_a_tool_are_named() -> None:
    with pytest.raises(ValidationError) as caught:
        chat(tools=[{**NOW, "colour": "red"}])
    error = refusal_of(caught.value)
    assert isinstance(error, UnknownParameter)
    assert error.detail["param"] == "tools[0].colour"


def test_pieces_of_calls_are_joined_or_streamed() -> None:
    parts = [
        ToolCallPart(index=0, id="a", name="add", arguments='{"a"'),
        ToolCallPart(index=0, arguments=": 1}"),
        ToolCallPart(index=1, id="b", name="now", arguments="{}"),
    ]
    first, second = join_calls(parts)
    assert first["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert (second["id"], second["type"]) == ("b", "function")
    assert as_delta(parts[1]) == {"index": 0, "function": {"arguments": ": 1}"}}
    assert as_delta(parts[2])["id"] == "b"
