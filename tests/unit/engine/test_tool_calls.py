"""Calls are found in recorded answers of each form, however the text is cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.engine.tool_calls import (
    HERMES,
    LISTED,
    LLAMA,
    MISTRAL,
    CallForm,
    ToolCalls,
    find_form,
)

PARIS = {"city": "Paris", "unit": "celsius"}
RECORDED = {
    "qwen 2.5": (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n'
        "</tool_call>",
        "",
        [("get_weather", PARIS)],
    ),
    "qwen 2.5, after some words and twice": (
        HERMES,
        "I'll look at both.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}\n</tool_call>',
        "I'll look at both.",
        [("get_weather", PARIS), ("add", {"a": 1, "b": [2, {"c": "}"}]})],
    ),
    "hermes 2 pro, arguments first": (
        HERMES,
        '<tool_call>\n{"arguments": {"city": "Paris", "unit": "celsius"}, "name": "get_weather"}\n'
        "</tool_call>\n",
        "",
        [("get_weather", PARIS)],
    ),
    "hermes, words after the call": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\nOne moment.',
        "\nOne moment.",
        [("now", {})],
    ),
    "llama 3.1": (
        LLAMA,
        '{"name": "get_weather", "parameters": {"city": "Paris", "unit": "celsius"}}',
        "",
        [("get_weather", PARIS)],
    ),
    "llama 3.1, several after the tag": (
        LLAMA,
        '<|python_tag|>{"name": "now", "parameters": {}};'
        ' {"name": "add", "parameters": {"a": "1"}}',
        "",
        [("now", {}), ("add", {"a": "1"})],
    ),
    "llama 3.2, the type before": (
        LLAMA,
        '{"type": "function", "name": "add", "parameters": {"a": "\\"1\\" \\\\"}}',
        "",
        [("add", {"a": '"1" \\'})],
    ),
    "mistral 7b v0.3": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}},'
        ' {"name": "now", "arguments": {}}]',
        "",
        [("get_weather", PARIS), ("now", {})],
    ),
    "mistral small 3.2": (
        MISTRAL,
        'Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "unit": "celsius"}'
        "[TOOL_CALLS]now{}",
        "Let me see.",
        [("get_weather", PARIS), ("now", {})],
    ),
    "a list that was required": (
        LISTED,
        '[{"name": "get_weather", "parameters": {"city": "Paris", "unit": "celsius"}}\n,'
        '{"name":"now","parameters":{ }}]',
        "",
        [("get_weather", PARIS), ("now", {})],
    ),
    "arguments as a string": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", {"a": 1})],
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
}
NO_CALLS = [
    (HERMES, "Use < or <tool, as in 1 < 2.  \n"),
    (HERMES, "<tool_call>nonsense</tool_call>"),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": 7, "arguments": {}} and so on'),
    (HERMES, "<tool_call>"),
    (LLAMA, 'The answer is {"name": "x", "parameters": {}}.'),
    (LLAMA, '{"a": 1}'),
    (LLAMA, '{"name": "'),
    (LLAMA, ""),
    (MISTRAL, "[1, 2] are a list, [TOOL"),
    (MISTRAL, "[TOOL_CALLS] and then words that name no function at all, and nothing like one."),
    (MISTRAL, "[TOOL_CALLS]name"),
    (LISTED, "[]"),
]


def read(calls: ToolCalls, pieces: Iterator[str] | list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls that a client would put together."""
    text, found = "", []
    for piece in pieces:
        text += calls.push(piece)
        found += calls.take()
    text += calls.push("", last=True)
    found += calls.take()
    whole: list[tuple[str, str]] = []
    for part in found:
        if part.name:
            assert part.index == len(whole)
            assert part.id
            whole.append((part.name, part.arguments))
        else:
            assert part.index == len(whole) - 1
            whole[-1] = (whole[-1][0], whole[-1][1] + part.arguments)
    assert calls.num_calls == len(whole)
    return text, whole


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("case", RECORDED)
def test_recorded_calls_are_found_in_pieces_of_any_size(case: str, step: int) -> None:
    form, answer, words, expected = RECORDED[case]
    pieces = [answer[at : at + step] for at in range(0, len(answer), step)]
    text, calls = read(ToolCalls(form, seed="s"), pieces)
    assert text == words
    assert [(name, json.loads(arguments)) for name, arguments in calls] == expected


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize(("form", "answer"), NO_CALLS)
def test_what_is_no_call_stays_text(form: CallForm, answer: str, step: int) -> None:
    pieces = [answer[at : at + step] for at in range(0, len(answer), step)]
    assert read(ToolCalls(form, seed="s"), pieces) == (answer, [])


@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL, LISTED]),
    st.lists(
        st.one_of(
            st.text(max_size=5),
            st.sampled_from(
                [
                    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
                    *('{"name": "f", ', '"arguments": {"a": [1]}', *'}{[],;"'),
                ]
            ),
        ),
        max_size=12,
    ),
)
def test_any_text_is_read_alike_whole_and_in_pieces(form: CallForm, pieces: list[str]) -> None:
    whole_text, whole_calls = read(ToolCalls(form, seed="s"), ["".join(pieces)])
    text, calls = read(ToolCalls(form, seed="s"), list("".join(pieces)))
    assert (text, calls) == (whole_text, whole_calls)
    if not calls:
        assert text == "".join(pieces)


def test_arguments_stream_before_their_end() -> None:
    calls = ToolCalls(HERMES, seed="s")
    assert calls.push('<tool_call>{"name": "add", "arguments": {"a": 12') == ""
    [part] = calls.take()
    assert (part.name, part.arguments) == ("add", '{"a": 12')
    calls.push("3}")
    assert [(part.name, part.arguments) for part in calls.take()] == [(None, "3}")]


def test_the_answer_is_a_named_tools_arguments() -> None:
    text, calls = read(ToolCalls(LISTED, seed="s", name="add"), list('{"a": {"b": "}"}} '))
    assert (text.strip(), calls) == ("", [("add", '{"a": {"b": "}"}}')])


def test_one_call_is_the_end_where_there_may_be_one() -> None:
    calls = ToolCalls(HERMES, seed="s", parallel=False)
    calls.push('<tool_call>{"name": "a", "arguments": {}')
    assert not calls.complete
    calls.push("}")
    assert calls.complete
    assert calls.push('</tool_call><tool_call>{"name": "b", "arguments": {}}') == ""
    assert calls.num_calls == 1


def test_ids_differ_between_calls_and_are_the_same_again() -> None:
    answer = '[TOOL_CALLS][{"name": "a", "arguments": {}}, {"name": "a", "arguments": {}}]'

    def ids(seed: str) -> list[str | None]:
        calls = ToolCalls(MISTRAL, seed=seed)
        calls.push(answer, last=True)
        return [part.id for part in calls.take() if part.id]

    first, second = ids("run/0")
    assert first != second
    assert ids("run/0") == [first, second] != ids("run/1")
    assert all(id and len(id) == 9 and id.isalnum() for id in (first, second))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("…{{ '[TOOL_CALLS]' }}…", MISTRAL),
        ("…<tool_call>\\n{…</tool_call>", HERMES),
        ("<tool_call><function=name>", None),
        ('ipython {"name": …, "parameters": …}', LLAMA),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_form_is_the_templates(template: str, form: CallForm | None) -> None:
    assert find_form(template) is form
