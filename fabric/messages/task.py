"""One attempt at one request, as it travels to an instance."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fabric.messages.request import AdapterDigest, Request
from fabric.messages.wire import Wire


class Task(Wire):
    """One attempt.

    Results are idempotent on (``id``, ``attempt``): ``id`` is the request's, ``attempt`` counts
    from 1. ``prefix`` holds the token ids an earlier attempt already delivered (single-choice,
    reproducible requests only): the instance continues after them and emits only new tokens, with
    positions going on from ``len(prefix)``. ``window`` is how many token events the instance may
    send before it gets ``Credit``. ``deadline_s`` counts from receipt. ``ticket`` pays for a
    task that did not come from the hub (a raw call): the instance redeems it there before it runs
    the task. Tasks with equal ``cache_salt`` (opaque; one for each tenant) may reuse each other's
    prefixes; without one a task reuses only its own. ``adapter`` is the digest of the adapter that
    the request names: of its one file, which the instance gets from the hub.
    """

    type: Literal["task"] = "task"
    id: str
    attempt: int = Field(ge=1)
    request: Request
    digest: str
    prefix: tuple[int, ...] = ()
    deadline_s: float = Field(gt=0.0)
    window: int = Field(default=256, ge=1)
    ticket: str | None = Field(default=None, repr=False)
    cache_salt: str = Field(default="", max_length=256)
    adapter: AdapterDigest | None = None
