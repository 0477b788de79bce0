"""Text in and out of tokens: prompts, an incremental detokenizer, stop strings."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from fabric.engine.tool_calls import LISTED, CallForm, ToolCalls, find_form
from fabric.errors import ContextExceeded, RequestInvalid
from fabric.messages import ChatInput, ChatMessage, TextInput, TokensInput, Tool, ToolCallPart

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

_KEPT_TEXTS = 2**15
"""Single tokens whose texts are kept: each is asked for twice whenever it is chosen."""


class Texts:
    """A model's tokenizer, as the engine uses it.

    Args:
        tokenizer: The model's.
        vocabulary: Rows of the input embedding; ids at or above are refused.
        context_tokens: The longest row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, vocabulary: int, context_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._decode_one = functools.lru_cache(_KEPT_TEXTS)(self._decode)

    def prompt_ids(self, prompt: TextInput | ChatInput | TokensInput) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            RequestInvalid: It has no tokens or ids that the model does not know, its text is not
                Unicode, or the chat template is missing or refuses the conversation.
            ContextExceeded: The text is so long that it need not be tokenized to know.
        """
        match prompt:
            case TokensInput(ids=given):
                self.check_ids(given, param="prompt")
                ids = list(given)
            case TextInput(text=text):
                ids = self._encode(text, add_special_tokens=True)
            case ChatInput():
                ids = self._encode(self._render(prompt), add_special_tokens=False)
        if not ids:
            raise RequestInvalid(param="prompt", value="", reason="it has no tokens")
        return ids

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """Refuse ids that the model has no embedding for.

        Raises:
            RequestInvalid: One is negative or too large.
        """
        for token_id in ids:
            if not 0 <= token_id < self._vocabulary:
                raise RequestInvalid(
                    param=param,
                    value=token_id,
                    reason=f"the model's token ids go from 0 to {self._vocabulary - 1}",
                )

    def stream(
        self, prompt: TextInput | ChatInput | TokensInput, *, stops: Sequence[str], seed: str
    ) -> TextStream:
        """Return what reads the answer to ``prompt``.

        Args:
            prompt: It may offer tools.
            stops: Stop strings; may be empty.
            seed: Of the ids of calls.

        Raises:
            RequestInvalid: It leaves calls to a model that was taught no form of them we know.
        """
        choice = prompt.tool_choice if isinstance(prompt, ChatInput) else None
        if choice is None:
            return TextStream(self, stops)
        form = LISTED if choice.required or choice.name else self._call_form(choice.tools)
        calls = ToolCalls(form, seed=seed, name=choice.name, parallel=choice.parallel)
        return TextStream(self, stops, calls, skip_special_tokens=not form.special)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are no character become U+FFFD."""
        decode = self._decode_one if len(ids) == 1 else self._decode
        return decode(tuple(ids), skip_special_tokens)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where in a prompt's text each of its tokens begins and ends, in characters."""
        return list(self._tokenizer.backend_tokenizer.encode(text).offsets)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token alone, special ones by their name."""
        return self._decode_one((token_id,), False)

    def _decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        return self._tokenizer.backend_tokenizer.decode(  # type: ignore[no-any-return]
            list(ids), skip_special_tokens=skip_special_tokens
        )

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        at_least = -(-len(text) // self._longest_token)
        if at_least > self._context_tokens:
            raise ContextExceeded(
                prompt_tokens=at_least, max_tokens=0, context_tokens=self._context_tokens
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestInvalid(
                param="prompt", value=text[error.start], reason="it is half of a surrogate pair"
            ) from error
        encoding = self._tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=add_special_tokens
        )
        return list(encoding.ids)

    def _call_form(self, tools: Sequence[Tool]) -> CallForm:
        try:
            form = find_form(self._tokenizer.get_chat_template(tools=_tools_as_json(tools)))
        except ValueError:  # it has no template, which rendering says better
            form = None
        if form is None:
            raise RequestInvalid(
                param="tools",
                value=[tool.name for tool in tools],
                reason="the model's chat template teaches it no form of tool calls that is known"
                ' here; send tool_choice "required" or a function, or ask another model',
            )
        return form

    def _render(self, chat: ChatInput) -> str:
        if self._tokenizer.chat_template is None:
            raise RequestInvalid(
                param="messages",
                value="a conversation",
                reason="this model has no chat template; send a plain prompt",
            )
        tools = chat.tool_choice.tools if chat.tool_choice else ()
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                [_turn_as_json(message) for message in chat.messages],
                tools=_tools_as_json(tools) or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates are programs and fail in any way
            raise RequestInvalid(
                param="messages",
                value=[message.role for message in chat.messages],
                reason=f"the model's chat template refuses the conversation ({error})",
            ) from error


class TextStream:
    """The readable text of one choice, token by token.

    Text is held back while a character is incomplete or while it may become a stop string or a
    tool call. What comes out joins to the text of all tokens, cut before the first stop string and
    without its calls.

    Args:
        texts: The model's tokenizer.
        stops: Stop strings; may be empty.
        calls: Finds tool calls, if any were offered.
        skip_special_tokens: Whether they leave no text.
    """

    def __init__(
        self,
        texts: Texts,
        stops: Sequence[str],
        calls: ToolCalls | None = None,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._texts = texts
        self._stops = tuple(stops)
        self._calls = calls
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._context = 0
        """Where the window starts that is decoded: spaces depend on the token before."""
        self._read = 0
        """How many ids are already text."""
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether the choice ends here: a stop string came, or the only call is whole."""
        return self._stopped or (self._calls is not None and self._calls.complete)

    @property
    def has_calls(self) -> bool:
        """Whether a call was found."""
        return self._calls is not None and self._calls.num_calls > 0

    def take_calls(self) -> tuple[ToolCallPart, ...]:
        """Return what became known of calls since the last time."""
        return () if self._calls is None else self._calls.take()

    def push(self, token_id: int) -> str:
        """Add a token; return what became readable. ``stopped`` may be set."""
        self._ids.append(token_id)
        before, window = self._windows()
        if len(window) <= len(before) or window.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._without_calls(self._release(window[len(before) :]), last=self._stopped)

    def flush(self) -> str:
        """Return what was held back; the choice has ended."""
        before, window = self._windows()
        self._read = len(self._ids)
        text = self._release(window[len(before) :])
        if not self._stopped:
            text, self._held = text + self._held, ""
        return self._without_calls(text, last=True)

    def _windows(self) -> tuple[str, str]:
        """Return the text of the tokens since ``_context``: of those read before, and of all."""
        skip = self._skip_special_tokens
        before = self._ids[self._context : self._read]
        return (
            self._texts.decode(before, skip_special_tokens=skip),
            self._texts.decode(self._ids[self._context :], skip_special_tokens=skip),
        )

    def _without_calls(self, text: str, *, last: bool) -> str:
        return text if self._calls is None else self._calls.push(text, last=last)

    def _release(self, text: str) -> str:
        pending = self._held + text
        cuts = [at for at in (pending.find(stop) for stop in self._stops) if at >= 0]
        if cuts:
            self._stopped, self._held = True, ""
            return pending[: min(cuts)]
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        released, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _tools_as_json(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools as chat templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ]


def _turn_as_json(turn: ChatMessage) -> dict[str, Any]:
    """Return a turn as chat templates take it: arguments are objects."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.loads(call.arguments)},
        }
        for call in turn.tool_calls
    ]
    return {
        "role": turn.role,
        "content": turn.content,
        **({"tool_calls": calls} if calls else {}),
        **({"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {}),
    }
