"""Which line of the user's own code is being traced."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path

from fabric.errors import TraceError

_OURS = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Line:
    """A line of source; ``file`` as Python names it."""

    file: str
    number: int

    @property
    def text(self) -> str:
        """What stands there, if it can be read."""
        return linecache.getline(self.file, self.number).strip()

    def error(self, reason: str) -> TraceError:
        """Return the error of this line."""
        return TraceError(file=self.file, line=self.number, source=self.text, reason=reason)


NOWHERE = Line("<program>", 0)


def here() -> Line:
    """Return the innermost line that is not the SDK's own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)


def refuse(reason: str) -> TraceError:
    """Return the error of the user's current line, to be raised."""
    return here().error(reason)
