"""What the OpenAI routes accept, and how they refuse the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from fabric.errors import BodyInvalid, FabricError, RequestInvalid, UnsupportedParameter
from fabric.gateway.openai_fields import MAX_PROMPTS
from fabric.gateway.openai_models import ChatBody, CompletionBody
from fabric.gateway.refusals import refusal_of
from fabric.messages import ChatInput, Choices, JsonSchema, Regex, Request, TextInput, TokensInput

COMPLETION = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}


def completions(**fields: Any) -> list[Request]:
    body = CompletionBody.model_validate_json(json.dumps(COMPLETION | fields))
    return list(body.requests())


def chat(**fields: Any) -> Request:
    return ChatBody.model_validate_json(json.dumps(CHAT | fields)).to_request()


def refusal(parse: Any, **fields: Any) -> FabricError:
    try:
        parse(**fields)
    except ValidationError as error:
        return refusal_of(error)
    except FabricError as error:
        return error
    raise AssertionError(f"{fields} was accepted")


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("a", [TextInput(text="a")]),
        ("", [TextInput(text="")]),
        (["a", "b"], [TextInput(text="a"), TextInput(text="b")]),
        ([1, 2], [TokensInput(ids=(1, 2))]),
        ([[1], [2, 3]], [TokensInput(ids=(1,)), TokensInput(ids=(2, 3))]),
    ],
)
def test_every_form_of_prompt_becomes_one_request_each(prompt: object, inputs: object) -> None:
    assert [request.input for request in completions(prompt=prompt)] == inputs


@pytest.mark.parametrize(
    "prompt",
    [
        *([], [[]], None, 5, [1, "a"], ["a", 1], [True], [-1], [1.5], [[1], []], {"text": "a"}),
        ["a"] * (MAX_PROMPTS + 1),
    ],
)
def test_other_prompts_are_refused(prompt: object) -> None:
    error = refusal(completions, prompt=prompt)
    assert isinstance(error, RequestInvalid)
    assert error.detail["param"] == "prompt"


def test_sampling_fields_arrive_in_the_request() -> None:
    sampling = completions(
        n=2, seed=7, stop="\n", temperature=0, top_p=0.5, top_k=3, max_tokens=9, ignore_eos=True
    )[0].sampling
    assert (sampling.n, sampling.seed, sampling.stop) == (2, 7, ("\n",))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 3)
    assert (sampling.max_tokens, sampling.ignore_eos) == (9, True)


def test_penalties_and_biases_arrive_in_the_request() -> None:
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2}
    sampling = chat(**penalties, logit_bias={"50": 1, "7": -100}, min_p=0.1).sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.0)
    assert (sampling.repetition_penalty, sampling.min_p) == (1.2, 0.1)
    assert sampling.logit_bias == {50: 1.0, 7: -100.0}


def test_what_an_answer_must_be_arrives_in_the_request() -> None:
    ordered = {"type": "object", "properties": {"z": {}, "a": {"const": "é"}}}
    named = {"name": "n", "schema": ordered, "strict": True, "description": "d"}
    constraint = chat(response_format={"type": "json_schema", "json_schema": named})
    definition = json.dumps(ordered, ensure_ascii=False)
    assert constraint.sampling.constraint == JsonSchema(definition=definition)
    ours = completions(fabric={"json_schema": ordered})[0].sampling
    assert ours.constraint == JsonSchema(definition=definition)
    any_object = chat(response_format={"type": "json_object"}).sampling.constraint
    assert any_object == JsonSchema(definition='{"type": "object"}')
    assert chat(response_format={"type": "text"}).sampling.constraint is None
    assert chat(fabric={"regex": "a+"}).sampling.constraint == Regex(pattern="a+")
    two = completions(fabric={"choices": ["a", "b"]})[0].sampling.constraint
    assert two == Choices(texts=("a", "b"))


def test_a_schema_over_the_cap_is_refused_before_it_travels() -> None:
    huge = {"name": "n", "schema": {"description": "x" * 70_000}}
    error = refusal(chat, response_format={"type": "json_schema", "json_schema": huge})
    assert isinstance(error, RequestInvalid)
    assert error.detail["param"] == "response_format"


def test_completions_default_to_16_tokens_and_chats_to_the_room_there_is() -> None:
    assert completions()[0].sampling.max_tokens == 16
    assert chat().sampling.max_tokens is None
    assert chat(max_completion_tokens=5).sampling.max_tokens == 5


def test_null_means_not_given() -> None:
    nulls = dict.fromkeys(["n", "seed", "stop", "temperature", "logprobs", "user", "fabric"])
    assert completions(**nulls)[0].sampling == completions()[0].sampling


@pytest.mark.parametrize(
    ("fields", "logprobs", "prompt_logprobs"),
    [
        ({}, None, False),
        ({"echo": True}, None, False),
        ({"logprobs": 0}, 0, False),
        ({"logprobs": 3, "echo": True}, 3, True),
        ({"echo": True, "prompt": [1, 2]}, None, True),
    ],
)
def test_the_prompt_is_scored_when_its_echo_needs_it(
    fields: dict[str, object], logprobs: int | None, prompt_logprobs: bool
) -> None:
    sampling = completions(**fields)[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_chat_logprobs_count_alternatives() -> None:
    assert chat().sampling.logprobs is None
    assert chat(logprobs=False).sampling.logprobs is None
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).sampling.logprobs == 4


def test_text_parts_are_joined_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}])
    assert isinstance(request.input, ChatInput)
    assert [(m.role, m.content) for m in request.input.messages] == [("system", "a\nb")]


def test_the_fabric_object_arrives_in_the_request() -> None:
    ours = {"data_site": "alpha", "data_bytes": 5, "sites": ["alpha"], "deadline_s": 3}
    ours |= {"overflow": True}
    request = chat(fabric=ours | {"policy": "fastest", "tier": "batch"})
    assert (request.data_site, request.data_bytes, request.sites) == ("alpha", 5, ("alpha",))
    assert request.overflow
    assert (request.deadline_s, request.policy, request.tier) == (3.0, "fastest", "batch")


@pytest.mark.parametrize(
    ("parse", "fields", "param"),
    [
        (completions, {"n": 0}, "n"),
        (completions, {"n": 17}, "n"),
        (completions, {"n": "2"}, "n"),
        (completions, {"n": True}, "n"),
        (completions, {"n": 1.5}, "n"),
        (completions, {"max_tokens": -1}, "max_tokens"),
        (completions, {"temperature": float("nan")}, "temperature"),
        (completions, {"temperature": 3}, "temperature"),
        (completions, {"temperature": -0.1}, "temperature"),
        (completions, {"temperature": "hot"}, "temperature"),
        (completions, {"top_p": 0}, "top_p"),
        (completions, {"seed": 2**63}, "seed"),
        (completions, {"stop": 5}, "stop"),
        (completions, {"stop": [""]}, "stop[0]"),
        (completions, {"stop": ["x"] * 17}, "stop"),
        (completions, {"logprobs": 21}, "logprobs"),
        (completions, {"logprobs": True}, "logprobs"),
        (completions, {"model": "no spaces allowed"}, "model"),
        (completions, {"model": None}, "model"),
        (completions, {"stream": "yes"}, "stream"),
        (completions, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completions, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (completions, {"colour": "red"}, "colour"),
        (completions, {"fabric": {"sites": ["No!"]}}, "fabric.sites[0]"),
        (completions, {"fabric": {"deadline_s": 0}}, "fabric.deadline_s"),
        (completions, {"fabric": {"policy": "best"}}, "fabric.policy"),
        (completions, {"fabric": {"weights": {"price": -1}}}, "fabric.weights.price"),
        (completions, {"fabric": {"policy": "local-only"}}, "fabric.data_site"),
        (completions, {"fabric": {"colour": 1}}, "fabric.colour"),
        (completions, {"min_p": 1.1}, "min_p"),
        (completions, {"presence_penalty": 2.1}, "presence_penalty"),
        (completions, {"frequency_penalty": "1"}, "frequency_penalty"),
        (completions, {"repetition_penalty": 0}, "repetition_penalty"),
        (completions, {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (completions, {"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        (completions, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (completions, {"fabric": {"regex": ""}}, "fabric.regex"),
        (completions, {"fabric": {"regex": "a" * 5000}}, "fabric.regex"),
        (completions, {"fabric": {"choices": []}}, "fabric.choices"),
        (completions, {"fabric": {"choices": ["a", ""]}}, "fabric.choices[1]"),
        (completions, {"fabric": {"regex": "a", "choices": ["a"]}}, "fabric.choices"),
        (completions, {"fabric": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        (chat, {"response_format": {"type": "xml"}}, "response_format.type"),
        (chat, {"response_format": {"type": "json_schema"}}, "response_format"),
        (chat, {"response_format": SCHEMA | {"type": "json_object"}}, "response_format"),
        (chat, {"response_format": SCHEMA, "fabric": {"regex": "a"}}, "fabric.regex"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": "hi"}, "messages"),
        (chat, {"messages": [{"role": "stranger", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        (chat, {"logprobs": 1}, "logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"max_completion_tokens": -1}, "max_completion_tokens"),
        (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value_and_a_remedy(
    parse: Any, fields: dict[str, object], param: str | None
) -> None:
    error = refusal(parse, **fields)
    assert isinstance(error, RequestInvalid)
    param = param or "messages[0].content"
    assert error.detail["param"] == param
    assert repr(param) in error.message
    unknown = error.code == "unknown_parameter"
    assert unknown == param.endswith(("colour", "stream_options.x"))


@pytest.mark.parametrize(
    ("parse", "name", "neutral", "other"),
    [
        (completions, "best_of", 1, 2),
        (completions, "suffix", "", "end"),
        (chat, "functions", [], [{"name": "f"}]),
        (chat, "function_call", "none", {"name": "f"}),
        (chat, "store", False, True),
    ],
)
def test_what_is_not_supported_passes_only_where_it_asks_for_nothing(
    parse: Any, name: str, neutral: object, other: object
) -> None:
    parse(**{name: neutral})
    parse(**{name: None})
    error = refusal(parse, **{name: other})
    assert isinstance(error, UnsupportedParameter)
    assert error.detail["param"] == name


@pytest.mark.parametrize("text", ["", "[]", '"x"', "{", '{"model": "\\ud800"}', "nul"])
def test_what_is_not_an_object_in_json_is_refused_as_a_body(text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate_json(text)
    assert isinstance(refusal_of(caught.value), BodyInvalid)


def test_a_long_value_is_not_repeated_whole() -> None:
    error = refusal(completions, stop=["x" * 10_000])
    assert len(error.message) < 300
