"""A model whose template teaches it tool calls: what it is told, and how its calls come out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fabric.engine.text import Texts
from fabric.messages import ChatInput, ChatMessage, Regex, Tool, ToolCall, ToolChoice

HERMES_TEMPLATE = (
    "{% if tools %}Tools:{% for t in tools %}{{ t | tojson }};{% endfor %}"
    "Answer <tool_call>.{% endif %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments.a }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}|{% endfor %}"
)
SHORT_TEMPLATE = "{% if tools %}<tool_call>?{% endif %}{{ messages[-1].content }}"
ADD = Tool(name="add", description="Adds.", parameters='{"type": "object", "required": ["a"]}')
CALL = '<tool_call>{"name": "add", "arguments": {"a": 12}}</tool_call>'
TWO_CALLS = f"Now: {CALL}\n{CALL}"


def chat(**choice: Any) -> ChatInput:
    turns = (ChatMessage(role="user", content="1+1"),)
    return ChatInput(messages=turns, tool_choice=ToolChoice(tools=(ADD,), **choice))


@pytest.fixture(scope="module")
def hermes(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, drive: Callable[..., Any]
) -> Any:
    path = tmp_path_factory.mktemp("models") / "hermes"
    copytree(tiny_dir, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = SHORT_TEMPLATE
    tokenizer.save_pretrained(path)
    return drive(path)


def told(template: str, tokens: PreTrainedTokenizerFast, prompt: ChatInput) -> str:
    tokens.chat_template = template
    texts = Texts(tokens, vocabulary=259, context_tokens=4096)
    return texts.decode(texts.prompt_ids(prompt))


def test_the_template_is_told_of_tools_calls_and_results(
    byte_tokens: PreTrainedTokenizerFast,
) -> None:
    turns = (
        ChatMessage(role="user", content="1+1"),
        ChatMessage(
            role="assistant",
            content="",
            tool_calls=(ToolCall(id="call_1", name="add", arguments='{"a": 12}'),),
        ),
        ChatMessage(role="tool", content="24", tool_call_id="call_1"),
    )
    given = byte_tokens.chat_template
    try:
        text = told(
            HERMES_TEMPLATE,
            byte_tokens,
            ChatInput(messages=turns, tool_choice=ToolChoice(tools=(ADD,))),
        )
        plain = told(HERMES_TEMPLATE, byte_tokens, ChatInput(messages=turns[:1]))
    finally:
        byte_tokens.chat_template = given
    offered, _, conversation = text.removeprefix("Tools:").partition(";Answer <tool_call>.")
    assert json.loads(offered) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "required": ["a"]},
        },
    }
    assert conversation == ("user:1+1|assistant:<tool_call>add 12</tool_call>|tool:24(call_1)|")
    assert plain == "user:1+1|"


def ask(hermes: Any, answer: str, *, prefix: tuple[int, ...] = (), **choice: Any) -> Any:
    """Ask for exactly ``answer``."""
    pattern = re.escape(answer).replace("\\\n", "\\n")
    return hermes.ask(
        chat(**choice),
        prefix=prefix,
        temperature=0.0,
        constraint=Regex(pattern=pattern),
    )


def test_calls_come_out_of_the_text_while_it_is_written(hermes: Any) -> None:
    heard = ask(hermes, TWO_CALLS)
    assert heard.finished.finish_reasons == ("tool_calls",)
    assert heard.text() == "Now:"
    parts = [part for token in heard.tokens() for part in token.tool_calls]
    assert [part.name for part in parts if part.name] == ["add", "add"]
    assert "".join(part.arguments for part in parts if part.index == 1) == '{"a": 12}'
    assert len(parts) > 4
    assert heard.tokens()[-1].finish_reason == "tool_calls"


def test_one_call_ends_the_answer_where_one_was_asked_for(hermes: Any) -> None:
    heard = ask(hermes, TWO_CALLS, parallel=False)
    assert heard.finished.finish_reasons == ("tool_calls",)
    parts = [part for token in heard.tokens() for part in token.tool_calls]
    assert {part.index for part in parts} == {0}
    assert len(heard.tokens()) < len(TWO_CALLS) - len(CALL)


def test_text_without_a_call_is_an_ordinary_answer(hermes: Any) -> None:
    heard = ask(hermes, "It is < 3.")
    assert heard.finished.finish_reasons == ("stop",)
    assert heard.text() == "It is < 3."


def test_an_attempt_that_goes_on_tells_the_rest_of_a_call_alone(hermes: Any) -> None:
    heard = ask(hermes, CALL)
    heard.finished  # noqa: B018
    cut = CALL.index("12") + 1
    again = hermes.ask(
        hermes.last_task.request.input,
        prefix=tuple(heard.ids()[:cut]),
        temperature=0.0,
        constraint=Regex(pattern=re.escape(CALL)),
    )
    again.finished  # noqa: B018
    parts = [part for token in again.tokens() for part in token.tool_calls]
    assert "".join(part.arguments for part in parts) == "2}"
    assert all(part.name is None for part in parts)


def test_a_model_that_was_taught_nothing_is_asked_only_where_calls_are_required(
    drive: Callable[..., Any],
) -> None:
    plain = drive()
    failure = plain.ask(chat(), max_tokens=4).failed.failure
    assert (failure.code, failure.detail["param"]) == ("invalid_parameter", "tools")
    named = plain.ask(chat(name="add"), temperature=0.0, constraint=Regex(pattern=r'\{"a": 7\}'))
    assert named.finished.finish_reasons == ("tool_calls",)
    assert named.text() == ""
    [first, *_] = [part for token in named.tokens() for part in token.tool_calls]
    assert first.name == "add"


def test_markers_that_are_special_tokens_are_read(byte_tokens: PreTrainedTokenizerFast) -> None:
    given = byte_tokens.chat_template
    byte_tokens.chat_template = "{{ '[TOOL_CALLS]' }}{{ tools }}"
    try:
        texts = Texts(byte_tokens, vocabulary=259, context_tokens=4096)
        stream = texts.stream(chat(), stops=(), seed="s")
        marked = "[TOOL_CALLS]add<unused>"
        ids = byte_tokens.backend_tokenizer.encode(marked).ids
        text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
    finally:
        byte_tokens.chat_template = given
    assert text == marked
