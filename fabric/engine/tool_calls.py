"""Finds tool calls in the text of an answer, in the form its model was trained to write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from fabric.engine.call_reader import CallReader, ReaderState
from fabric.messages import ToolCallPart


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """How calls are written.

    ``opening`` begins them, or the answer itself does where it is empty. Between calls stand
    ``fillers``. With ``named`` the name may come before bare arguments. ``special``: markers are
    special tokens, which text leaves out unless it is asked for them.
    """

    opening: str
    fillers: tuple[str, ...]
    named: bool = False
    special: bool = False
    id_chars: int = 24


HERMES = CallForm(opening="<tool_call>", fillers=("<tool_call>", "</tool_call>"))
"""Hermes and Qwen: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``."""

LLAMA = CallForm(opening="", fillers=("<|python_tag|>", ";", ","), special=True)
"""Llama 3: the answer is ``{"name": …, "parameters": {…}}``; several are parted by semicolons."""

MISTRAL = CallForm(
    opening="[TOOL_CALLS]",
    fillers=("[TOOL_CALLS]", "[", ",", "]"),
    named=True,
    special=True,
    id_chars=9,
)
"""Mistral: ``[TOOL_CALLS][{"name": …, "arguments": {…}}, …]``, or ``[TOOL_CALLS]name{…}`` with
``[ARGS]`` between the two. Its templates refuse ids that have not nine characters."""

LISTED = CallForm(opening="", fillers=("[", ",", "]"))
"""Of an answer that must hold calls, by any model: ``[{"name": …, "parameters": {…}}, …]``."""

_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})\s*(?:\[ARGS\]\s*)?(?=\{)")
_LONGEST_NAMED = 80


def find_form(template: str) -> CallForm | None:
    """Return the form that a chat template teaches its model, ``None`` for any other."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return LLAMA
    return None


class ToolCalls:
    """The calls of one choice, told apart from its text token by token.

    What turns out to be no call is text again.

    Args:
        form: How calls are written.
        seed: Ids are made from it: the same again when the choice is computed again.
        name: Of the tool whose arguments the whole answer is.
        parallel: Whether there may be more than one.
    """

    def __init__(
        self, form: CallForm, *, seed: str, name: str | None = None, parallel: bool = True
    ) -> None:
        self._form = form
        self._seed = seed
        self._parallel = parallel
        self._pending = ""
        self._passed = ""
        """Fillers since the last call; text again if none follows."""
        self._reader = CallReader(name) if name else None
        self._calling = not form.opening
        """Whether a call should come next."""
        self._closed = False
        """Whether nothing but text can follow."""
        self._parts: list[ToolCallPart] = []
        self.num_calls = 0
        self._announced = False

    @property
    def complete(self) -> bool:
        """Whether all calls that there may be are there."""
        return not self._parallel and self.num_calls > 0 and self._reader is None

    def push(self, text: str, *, last: bool = False) -> str:
        """Take the next text of the answer; return what of it is no call.

        Args:
            text: Some or none.
            last: Whether the answer has ended: what was held back comes out.
        """
        self._pending += text
        out, before = "", None
        while (state := (self._pending, self._calling, self._reader)) != before:
            before = state
            out += self._advance(last)
        if last:
            out += self._give_back() + self._pending
            self._pending = ""
        return "" if last and self.num_calls and out.isspace() else out

    def take(self) -> tuple[ToolCallPart, ...]:
        """Return the pieces of calls that became known since the last time."""
        parts, self._parts = tuple(self._parts), []
        return parts

    def _advance(self, last: bool) -> str:
        if self.complete:
            self._pending = ""
            return ""
        if self._reader is not None:
            return self._read(self._reader)
        return self._look(last) if self._calling else self._pass_text(last)

    def _read(self, reader: CallReader) -> str:
        self._pending = reader.push(self._pending)
        if reader.state is ReaderState.BROKEN:
            return self._give_back()
        if reader.name:
            self._report(reader.name, reader.take())
        if reader.state is ReaderState.DONE:
            self._reader, self._announced, self._passed = None, False, ""
            self._calling = True
        return ""

    def _report(self, name: str, arguments: str) -> None:
        if not self._announced:
            self._announced = True
            self.num_calls += 1
            called = f"{self._seed}/{self.num_calls}".encode()
            digits = blake2b(called).hexdigest()[: self._form.id_chars]
            id = digits if self._form.id_chars < 24 else f"call_{digits}"
            part = ToolCallPart(index=self.num_calls - 1, id=id, name=name, arguments=arguments)
            self._parts.append(part)
        elif arguments:
            self._parts.append(ToolCallPart(index=self.num_calls - 1, arguments=arguments))

    def _look(self, last: bool) -> str:
        """Pass over what stands between calls, up to the next one."""
        text = self._pending.lstrip()
        num_spaces = len(self._pending) - len(text)
        fillers = [mark for mark in self._form.fillers if text.startswith(mark)]
        unsure = any(mark != text and mark.startswith(text) for mark in self._form.fillers)
        if unsure and not last:
            return ""
        if fillers:
            self._pass(num_spaces + max(map(len, fillers)))
            if self.num_calls and self._form.opening not in fillers:
                self._passed = ""
        elif text.startswith("{"):
            self._pass(num_spaces)
            self._reader = CallReader()
        elif self._form.named and (named := _NAMED.match(text)):
            self._pass(num_spaces + named.end())
            self._reader = CallReader(named.group(1))
        elif last or not self._form.named or "{" in text or len(text) > _LONGEST_NAMED:
            return self._give_back()
        return ""

    def _pass(self, num_chars: int) -> None:
        self._passed += self._pending[:num_chars]
        self._pending = self._pending[num_chars:]

    def _pass_text(self, last: bool) -> str:
        """Return text up to the next opening; space before one belongs to it."""
        if self._closed:
            text, self._pending = self._pending, ""
            return text
        text, opening, rest = self._pending.partition(self._form.opening)
        if opening:
            words = text.rstrip()
            self._calling, self._passed, self._pending = True, text[len(words) :] + opening, rest
            return words
        if last:
            self._pending = ""
            return text
        kept = text.rstrip()
        if kept == text:
            kept = text[: len(text) - _num_overlapping(text, self._form.opening)].rstrip()
        self._pending = text[len(kept) :]
        return kept

    def _give_back(self) -> str:
        """Return as text what seemed to be a call; a call that was begun stays one."""
        read = self._reader.raw if self._reader else ""
        text = "" if self._announced else self._passed + read
        self._reader, self._announced, self._calling, self._passed = None, False, False, ""
        self._closed = not self._form.opening
        return text


def _num_overlapping(text: str, mark: str) -> int:
    """Return how many characters at the end of ``text`` begin ``mark``."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
