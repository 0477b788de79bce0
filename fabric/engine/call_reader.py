"""Reads one tool call, a JSON object with a name and arguments, while it is being written."""

from __future__ import annotations

import json
from enum import Enum, auto

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class ReaderState(Enum):
    """How far a call has been read."""

    OPEN = auto()
    """Its end has not come."""
    DONE = auto()
    BROKEN = auto()
    """It is no call."""


class CallReader:
    """One call, read a character at a time.

    The arguments come out as they are written, once the name is known; arguments that are
    themselves a JSON string are read from it at their end. Other keys are passed over.

    Args:
        name: Of a call whose text is its arguments alone; ``None`` for an object with both.
    """

    def __init__(self, name: str | None = None) -> None:
        self.state = ReaderState.OPEN
        self.name = name
        self.raw = ""
        """All that was read."""
        self._bare = name is not None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._key: str | None = None
        self._value = ""
        """Of the key under way (or the key itself), without the space around it."""
        self._arguments = ""
        """As far as they are known; those of a nameless call wait here."""
        self._num_taken = 0

    def push(self, text: str) -> str:
        """Read on; return what follows the call."""
        for at, char in enumerate(text):
            self.raw += char
            self._read(char)
            if self.state is not ReaderState.OPEN:
                return text[at + 1 :]
        return ""

    def take(self) -> str:
        """Return the arguments that became known since the last time."""
        taken, self._num_taken = self._arguments[self._num_taken :], len(self._arguments)
        return taken

    def _read(self, char: str) -> None:
        if self._in_string:
            self._keep(char)
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif self._depth == 0 and char != "{":
            self.state = self.state if char in _SPACE else ReaderState.BROKEN
        elif char in "{[":
            self._depth += 1
            if self._depth > 1 or self._bare:
                self._keep(char)
        elif char in "}]":
            self._depth -= 1
            if self._depth or self._bare:
                self._keep(char)
            if not self._depth:
                self._end()
        elif self._depth == 1 and not self._bare and char == ":" and self._key is None:
            self._key, self._value = _read_string(self._value) or "", ""
        elif self._depth == 1 and not self._bare and char == ",":
            self._end_value()
        elif self._depth > 1 or self._bare or char not in _SPACE:
            self._keep(char)
            self._in_string = char == '"'

    def _keep(self, char: str) -> None:
        self._value += char
        if self._bare or (self._key in _ARGUMENTS and self._value[0] == "{"):
            self._arguments += char

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _read_string(self._value)
            self.state = ReaderState.OPEN if self.name else ReaderState.BROKEN
        elif self._key in _ARGUMENTS and not self._arguments:
            given = self._value if self._value != "null" else ""
            self._arguments = _read_string(given) or given
        self._key, self._value = None, ""

    def _end(self) -> None:
        if not self._bare:
            self._end_value()
            self._arguments = self._arguments or "{}"
        if self.state is ReaderState.OPEN:
            self.state = ReaderState.DONE if self.name else ReaderState.BROKEN


def _read_string(text: str) -> str | None:
    """Return what a JSON string says, if ``text`` is one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
