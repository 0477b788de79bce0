"""Tasks for an engine, and what it says of them: for the contract suites."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from fabric.engine.interface import Engine
from fabric.messages import (
    EMBED_SAMPLING,
    Embedding,
    Event,
    Failed,
    Finished,
    Request,
    Sampling,
    Task,
    TextInput,
    Token,
    TokensInput,
)

PROMPT = [72, 101, 108, 108, 111]


@dataclass
class Heard:
    """A sink that keeps its events."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)
        if isinstance(event, Token):
            self.begun.set()
        if isinstance(event, Finished | Failed):
            self.begun.set()
            self.ended.set()

    def tokens(self, choice: int = 0) -> list[Token]:
        """Return the tokens of a choice."""
        return [e for e in self.events if isinstance(e, Token) and e.choice == choice]

    def ids(self, choice: int = 0) -> list[int]:
        """Return their ids."""
        return [token.token_id for token in self.tokens(choice)]

    def text(self, choice: int = 0) -> str:
        """Return their text."""
        return "".join(token.text for token in self.tokens(choice))

    @property
    def last(self) -> Finished | Failed:
        """The event that ends the task, waited for."""
        assert self.ended.wait(120), self.events[-3:]
        last = self.events[-1]
        assert isinstance(last, Finished | Failed)
        return last

    @property
    def finished(self) -> Finished:
        """The same, of a task that did not fail."""
        assert isinstance(self.last, Finished), self.last
        return self.last

    @property
    def vector(self) -> list[float]:
        """The vector of a prompt."""
        assert self.finished
        (event,) = (e for e in self.events if isinstance(e, Embedding))
        return event.vector

    @property
    def failure_code(self) -> str:
        """The code of what the task failed by."""
        assert isinstance(self.last, Failed), self.last
        return self.last.failure.code


class Asker:
    """An engine, and tasks for it; what is asked for is a greedy answer, or a vector."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last_task: Task | None = None

    def ask(
        self,
        prompt: Any = PROMPT,
        *,
        prefix: tuple[int, ...] = (),
        digest: str | None = None,
        deadline_s: float = 120.0,
        **sampling: Any,
    ) -> Heard:
        """Submit a query; a prompt is text, ids or an input."""
        given = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling
        wanted = Sampling.model_validate(given)
        request = Request(model="tiny", input=_get_input(prompt), sampling=wanted)
        return self._submit(request, digest=digest, prefix=prefix, deadline_s=deadline_s)

    def embed(
        self,
        prompt: Any = PROMPT,
        *,
        digest: str | None = None,
        deadline_s: float = 120.0,
        **asked: Any,
    ) -> Heard:
        """Submit a prompt to be embedded; ``asked`` are the request's other fields."""
        request = Request(
            mode="embed",
            model="tiny",
            input=_get_input(prompt),
            sampling=EMBED_SAMPLING,
            **asked,
        )
        return self._submit(request, digest=digest, prefix=(), deadline_s=deadline_s)

    def submit(self, task: Task) -> Heard:
        """Submit a task."""
        self.last_task = task
        heard = Heard()
        self.engine.submit(task, heard)
        return heard

    def _submit(
        self, request: Request, *, digest: str | None, prefix: tuple[int, ...], deadline_s: float
    ) -> Heard:
        return self.submit(
            Task(
                id=request.id,
                attempt=1,
                request=request,
                digest=digest or self.engine.info.digest,
                prefix=prefix,
                deadline_s=deadline_s,
            )
        )


def _get_input(prompt: Any) -> Any:
    if isinstance(prompt, list):
        return TokensInput(ids=tuple(prompt))
    return TextInput(text=prompt) if isinstance(prompt, str) else prompt
