"""Tasks for an engine, and what it says of them: for contract suites and the engine's tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from fabric.engine.interface import Engine
from fabric.messages import (
    EMBED_SAMPLING,
    Embedding,
    Event,
    Failed,
    Finished,
    PromptScored,
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
    on_event: Callable[[Event], None] | None = None

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)
        if self.on_event:
            self.on_event(event)
        if isinstance(event, Token):
            self.begun.set()
        if isinstance(event, Finished | Failed):
            self.begun.set()
            self.ended.set()

    def wait(self) -> Self:
        """Return it once the task has ended."""
        assert self.ended.wait(120), self.events[-3:]
        return self

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
    def scored(self) -> PromptScored:
        """The scores of a prompt."""
        (event,) = (e for e in self.events if isinstance(e, PromptScored))
        return event

    @property
    def last(self) -> Finished | Failed:
        """The event that ends the task, waited for."""
        last = self.wait().events[-1]
        assert isinstance(last, Finished | Failed)
        return last

    @property
    def finished(self) -> Finished:
        """The same, of a task that did not fail."""
        assert isinstance(self.last, Finished), self.last
        return self.last

    @property
    def failed(self) -> Failed:
        """The same, of a task that did."""
        assert isinstance(self.last, Failed), self.last
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
        return self.failed.failure.code


class Asker:
    """An engine that has been started, and tasks for it."""

    usual: ClassVar[Mapping[str, Any]] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    """How a query is answered where it does not say."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last_task: Task | None = None

    def ask(
        self,
        prompt: Any = PROMPT,
        *,
        tier: str = "standard",
        prefix: tuple[int, ...] = (),
        digest: str | None = None,
        deadline_s: float = 120.0,
        cache_salt: str = "",
        adapter: str | None = None,
        heard: Heard | None = None,
        **sampling: Any,
    ) -> Heard:
        """Submit a query; a prompt is text, ids or an input."""
        wanted = Sampling.model_validate({**self.usual, **sampling})
        request = Request.model_validate(
            {"model": "tiny", "input": _get_input(prompt), "sampling": wanted, "tier": tier}
        )
        task = self._get_task(
            request,
            digest=digest,
            prefix=prefix,
            deadline_s=deadline_s,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        return self.submit(task, heard)

    def embed(
        self,
        prompt: Any = PROMPT,
        *,
        digest: str | None = None,
        deadline_s: float = 120.0,
        cache_salt: str = "",
        task_adapter: str | None = None,
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
        task = self._get_task(
            request,
            digest=digest,
            deadline_s=deadline_s,
            cache_salt=cache_salt,
            adapter=task_adapter,
        )
        return self.submit(task)

    def submit(self, task: Task, heard: Heard | None = None) -> Heard:
        """Submit a task."""
        self.last_task = task
        heard = heard or Heard()
        self.engine.submit(task, heard)
        return heard

    def _get_task(self, request: Request, *, digest: str | None, **fields: Any) -> Task:
        named = digest or self.engine.info.digest
        return Task(id=request.id, attempt=1, request=request, digest=named, **fields)


def _get_input(prompt: Any) -> Any:
    if isinstance(prompt, list):
        return TokensInput(ids=tuple(prompt))
    return TextInput(text=prompt) if isinstance(prompt, str) else prompt
