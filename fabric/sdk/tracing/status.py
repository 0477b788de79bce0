"""One line that says in a notebook how far a program is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

from fabric.sdk.programs import OnEvent, ProgramEvent, RunToken

if TYPE_CHECKING:
    from fabric.messages import Program


class Status:
    """Rewrites its line in place; outside a notebook it is silent.

    Args:
        program: What is run.
    """

    def __init__(self, program: Program) -> None:
        runs = f"{len(program.runs)} run{'s' * (len(program.runs) != 1)}"
        self._what = f"{runs}, {program.num_nodes} nodes"
        self._num_tokens = self._num_saves = 0
        self._handle: Any = None

    def __enter__(self) -> Self:
        shell = _notebook()
        if shell is not None:
            from IPython.display import display

            self._handle = display(_Line(f"SENT · {self._what}"), display_id=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            self._show(f"FAILED · {self._what}")

    def watch(self, on_event: OnEvent | None) -> OnEvent | None:
        """Return what counts events before it passes them on; nothing where nobody looks."""
        if self._handle is None:
            return on_event

        def watched(event: ProgramEvent) -> None:
            if isinstance(event, RunToken):
                self._num_tokens += 1
            else:
                self._num_saves += 1
            counts = f"{self._num_tokens} tokens, {self._num_saves} saves"
            self._show(f"RUNNING · {self._what} · {counts}")
            if on_event is not None:
                on_event(event)

        return watched

    def end(self, summary: str) -> None:
        """Show where it ran and for how much."""
        self._show(f"COMPLETED · {summary}")

    def _show(self, text: str) -> None:
        if self._handle is not None:
            self._handle.update(_Line(text))


class _Line:
    def __init__(self, text: str) -> None:
        self._text = text

    def _repr_html_(self) -> str:
        from html import escape

        return f'<div style="opacity:.65;font-size:85%">{escape(self._text)}</div>'

    def __repr__(self) -> str:
        return self._text


def _notebook() -> Any:
    """Return the notebook's shell, if this is one; IPython is never imported for it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if type(shell).__name__ == "ZMQInteractiveShell" else None
