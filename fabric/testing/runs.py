"""What tests read of runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fabric.broker import Run
from fabric.messages import (
    Request,
    RunCompleted,
    RunEvent,
    RunFailed,
    Token,
)

Ask = Callable[..., Request]
"""Makes a request."""


def words(events: list[RunEvent]) -> list[int]:
    """Return the positions of the tokens that came."""
    return [event.position for event in events if isinstance(event, Token)]


def last(events: list[RunEvent]) -> RunCompleted | RunFailed:
    """Return a run's one end, which is its last event."""
    ends = [event for event in events if isinstance(event, RunCompleted | RunFailed)]
    assert ends == events[-1:]
    return ends[0]


async def settled(hub: Any, run: Run) -> Any:
    """Return the run's record, which is written after the client's last event."""
    await hub.offload(lambda: None)
    return hub.catalog.run(run.id)
