"""The frames of a session, the same on the hub's socket and on an instance's direct route.

An instance says ``Hello``, is answered ``Welcome``, and then gets ``Task``, ``Cancel``, ``Credit``
and ``Drain``; it sends ``Heartbeat``, events, and ``Goodbye`` before it leaves. On the direct route
the client connects and the instance still speaks first, so both sides need only one implementation.
Of a task that came with a ticket (a raw call) the instance asks the hub first (``Redeem``, answered
``Redeemed``) and reports at its end what it consumed (``Metered``, answered ``Settled``).

A WebSocket message is text and carries one frame or several, a frame a line.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fabric.errors import ProtocolViolation
from fabric.messages.events import (
    Accepted,
    Embedding,
    Failed,
    Failure,
    Finished,
    PromptScored,
    Saves,
    Token,
    Usage,
)
from fabric.messages.lifecycle import InstanceState
from fabric.messages.points import PointManifest
from fabric.messages.request import Mode, ModelRef, Request, SiteName
from fabric.messages.task import Task
from fabric.messages.wire import Wire

PROTOCOL = 6
"""The version of this protocol; a peer with another one is refused."""

MAX_FRAME_BYTES = 16 * 2**20
"""The largest frame either side reads."""


class Limits(Wire):
    """What an instance can take: tokens of one row, rows at once, tokens of KV cache, and which
    modes of requests; and whether it fetches adapters."""

    context_tokens: int = Field(ge=1)
    max_rows: int = Field(ge=1)
    cache_tokens: int = Field(ge=1)
    modes: tuple[Mode, ...] = Field(default=("query",), min_length=1)
    adapters: bool = False


class StepTimes(Wire):
    """Steps of one kind since the instance's start."""

    num: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0.0)


class Load(Wire):
    """How busy an instance is; rates are exponentially weighted over its recent steps.

    ``step_s`` is what the next step of decoding should take, ``prefill_wait_s`` the prompts that
    wait. ``busy_s`` (seconds of all steps), ``num_preempted``, the prefix cache's tokens, those of
    speculation (drafted, and accepted of them) and the steps of prefill alone, of decoding alone
    and of both count from the instance's start.
    """

    num_running: int = Field(default=0, ge=0)
    num_waiting: int = Field(default=0, ge=0)
    cache_usage: float = Field(default=0.0, ge=0.0, le=1.0)
    prefill_tokens_per_s: float = Field(default=0.0, ge=0.0)
    decode_tokens_per_s: float = Field(default=0.0, ge=0.0)
    step_s: float = Field(default=0.0, ge=0.0)
    prefill_wait_s: float = Field(default=0.0, ge=0.0)
    busy_s: float = Field(default=0.0, ge=0.0)
    num_preempted: int = Field(default=0, ge=0)
    prefix_queried_tokens: int = Field(default=0, ge=0)
    prefix_found_tokens: int = Field(default=0, ge=0)
    drafted_tokens: int = Field(default=0, ge=0)
    accepted_tokens: int = Field(default=0, ge=0)
    prefill_steps: StepTimes = StepTimes()
    decode_steps: StepTimes = StepTimes()
    mixed_steps: StepTimes = StepTimes()


class Hello(Wire):
    """An instance presents itself. It is ready: its canary has run.

    ``digest`` is of the model's tensors; ``deadline_s`` the seconds until its block ends, if known;
    ``direct_url`` where clients at the same site may reach it; ``points`` where programs may read
    and write, of an instance that runs them.
    """

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    instance: str
    site: SiteName
    model: ModelRef
    digest: str
    limits: Limits
    dtype: str
    engine: str
    load: Load = Load()
    direct_url: str | None = None
    deadline_s: float | None = None
    points: PointManifest | None = None


class Heartbeat(Wire):
    """Sent every ``Welcome.heartbeat_s``; three missed ones mean the instance is lost."""

    type: Literal["heartbeat"] = "heartbeat"
    state: InstanceState
    load: Load


class Goodbye(Wire):
    """The instance leaves; nothing of its work is unfinished."""

    type: Literal["goodbye"] = "goodbye"
    reason: str


class Redeem(Wire):
    """A ticket came with a task: may it run, and is its largest charge held?"""

    type: Literal["redeem"] = "redeem"
    task_id: str
    attempt: int
    ticket: str = Field(repr=False)
    request: Request


class Metered(Wire):
    """What a redeemed task consumed, however it ended; sent until it is ``Settled``.

    ``failure_code`` is ``None`` for a task that was answered. Times count from when the task came
    in.
    """

    type: Literal["metered"] = "metered"
    task_id: str
    attempt: int
    usage: Usage
    failure_code: str | None = None
    first_token_s: float | None = None
    total_s: float = Field(default=0.0, ge=0.0)


class Welcome(Wire):
    """The hub accepts the session."""

    type: Literal["welcome"] = "welcome"
    session: str
    heartbeat_s: float = Field(gt=0.0)


class Cancel(Wire):
    """The caller wants no more of this attempt; the instance frees its rows within one step."""

    type: Literal["cancel"] = "cancel"
    task_id: str
    attempt: int


class Credit(Wire):
    """The reader took ``num_events`` token events of this attempt; as many more may be sent."""

    type: Literal["credit"] = "credit"
    task_id: str
    attempt: int
    num_events: int = Field(ge=1)


class Redeemed(Wire):
    """The answer to ``Redeem``: the task may run unless there is a ``failure``."""

    type: Literal["redeemed"] = "redeemed"
    task_id: str
    attempt: int
    failure: Failure | None = None


class Settled(Wire):
    """The answer to ``Metered``: the books are closed on this task."""

    type: Literal["settled"] = "settled"
    task_id: str
    attempt: int


class Drain(Wire):
    """Take no new tasks, finish the running ones, say goodbye."""

    type: Literal["drain"] = "drain"
    reason: str


FromInstance = Annotated[
    Hello
    | Heartbeat
    | Goodbye
    | Accepted
    | PromptScored
    | Token
    | Embedding
    | Saves
    | Finished
    | Failed
    | Redeem
    | Metered,
    Field(discriminator="type"),
]
FromHub = Annotated[
    Welcome | Task | Cancel | Credit | Redeemed | Settled | Drain, Field(discriminator="type")
]

_from_instance: TypeAdapter[FromInstance] = TypeAdapter(FromInstance)
_from_hub: TypeAdapter[FromHub] = TypeAdapter(FromHub)


def parse_from_instance(data: str | bytes) -> FromInstance:
    """Return the frame an instance sent.

    Raises:
        ProtocolViolation: It is not a frame of this protocol.
    """
    try:
        return _from_instance.validate_json(data)
    except ValidationError as error:
        raise ProtocolViolation(peer="The instance", reason=_first_line(error)) from error


def parse_from_hub(data: str | bytes) -> FromHub:
    """Return the frame the hub (or a direct client) sent.

    Raises:
        ProtocolViolation: It is not a frame of this protocol.
    """
    try:
        return _from_hub.validate_json(data)
    except ValidationError as error:
        raise ProtocolViolation(peer="The hub", reason=_first_line(error)) from error


def _first_line(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
