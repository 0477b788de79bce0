"""Traces that do not compile to a program."""

from __future__ import annotations

from fabric.errors.programs import ProgramError


class TraceError(ProgramError):
    """A line of the user's own code asks for what a program cannot say.

    Args:
        file: Where the line stands.
        line: Its number, from 1; 0 where there is none.
        source: The line itself, as far as it can be read.
        reason: What is wrong with it and what to write instead; a sentence.
    """

    code = "trace_invalid"
    http_status = 400

    def __init__(self, *, file: str, line: int, source: str, reason: str) -> None:
        where = f"{file}, line {line}" + (f": `{source}`" if source else "")
        super().__init__(f"{where}. {reason}", file=file, line=line, source=source, reason=reason)
