"""What the hub tells the client of a run: where it was placed and why, and how it ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fabric.messages.events import (
    Embedding,
    Failure,
    FinishReason,
    PromptScored,
    Saves,
    Token,
    Usage,
)
from fabric.messages.wire import Wire


class Candidate(Wire):
    """One replica the broker considered.

    ``excluded`` says why a filter removed it; otherwise ``cost_s`` holds the expected seconds by
    component (queue, service, data, price, risk; cold where it must be started) and ``total_s``
    their sum. ``correction`` is the running mean of observed over predicted seconds there, which
    the expectation has in it. In the short table of a large fleet ``num_alike`` counts the
    replicas of the site that the line stands for. ``ready_in_s`` is told of one on its way.
    """

    site: str
    instance: str
    digest: str
    excluded: str | None = None
    cost_s: dict[str, float] = {}
    total_s: float | None = None
    correction: float = 1.0
    num_alike: int = Field(default=1, ge=1)
    ready_in_s: float | None = None


class Placement(Wire):
    """The broker's choice, with its table of reasons."""

    site: str
    instance: str
    digest: str
    reason: str
    candidates: tuple[Candidate, ...]


class Placed(Wire):
    """The request goes to a replica; sent again for every further attempt."""

    type: Literal["placed"] = "placed"
    attempt: int
    placement: Placement
    because: str | None = None
    """For attempts after the first: what ended the one before."""


class RunCompleted(Wire):
    """The run is answered and settled; ``adapter`` is the digest of the one that it named."""

    type: Literal["completed"] = "completed"
    run: str
    model: str
    digest: str
    adapter: str | None = None
    site: str
    instance: str
    attempts: int
    finish_reasons: tuple[FinishReason, ...]
    usage: Usage
    charge_usu: int = Field(ge=0)
    first_token_s: float | None
    total_s: float
    placement: Placement


class RunFailed(Wire):
    """The run ended by an error; what was delivered before is charged."""

    type: Literal["run_failed"] = "run_failed"
    run: str
    failure: Failure
    usage: Usage = Usage()
    charge_usu: int = Field(default=0, ge=0)


RunEvent = Annotated[
    Placed | PromptScored | Token | Embedding | Saves | RunCompleted | RunFailed,
    Field(discriminator="type"),
]
