"""What goes into the broker's state (events) and what comes out of it (instructions).

Every event carries ``now``, seconds on a monotonic clock: the state has none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fabric.broker.programs import ProgramBounds
from fabric.broker.select import Offer
from fabric.broker.tiers import Factors
from fabric.catalog import RedemptionRecord
from fabric.errors import FabricError
from fabric.ledger import TIERS, Rate, kv_block_s_bound
from fabric.messages import (
    Event,
    Hello,
    Load,
    Placement,
    Request,
    RunEvent,
    RunState,
    Task,
    Usage,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request whose largest charge is held.

    Args:
        request: What was asked.
        project: Who pays.
        key_id: Who asked.
        created_at: When, by the wall clock (UTC).
        model: The resolved version as ``name@revision``.
        digest: Its digest; the run is never served by another.
        adapter: The digest of the adapter that it names.
        offers: What it would cost, by site.
        rates: Prices, by site.
        held_allocation: The allocation that holds.
        held_usu: How much it holds.
        prompt_tokens_bound: At least as many tokens as the prompt has.
        max_output_tokens: The most tokens of one choice, or of all runs of a program.
        bounds: What a program may take.
        hidden: Sites and digests of which the caller is told nothing.
        own: Sites of the caller's own, and whether they keep the request.
        factors: What each tier multiplies a charge by.
    """

    request: Request
    project: str
    key_id: str
    created_at: datetime
    model: str
    digest: str
    offers: Mapping[str, Offer]
    rates: Mapping[str, Rate]
    held_allocation: str
    held_usu: int
    prompt_tokens_bound: int
    max_output_tokens: int
    adapter: str | None = None
    bounds: ProgramBounds | None = None
    hidden: frozenset[str] = frozenset()
    own: Mapping[str, bool] = field(default_factory=dict)
    factors: Factors = field(default_factory=lambda: TIERS)

    @property
    def program(self) -> str | None:
        """The digest of the program, if it is one."""
        return None if self.bounds is None else self.bounds.program

    @property
    def kv_block_s_bound(self) -> float:
        """The most block-seconds of the KV cache that it can keep."""
        request = self.request
        row_tokens = self.prompt_tokens_bound + self.max_output_tokens
        return kv_block_s_bound(request.sampling.n, row_tokens, request.deadline_s)

    @property
    def adapter_s_bound(self) -> float:
        """The most seconds that it can use an adapter's slot."""
        return adapter_s_bound(self.request)

    @property
    def name(self) -> str:
        """The model's name without its revision."""
        return self.model.partition("@")[0]


def adapter_s_bound(request: Request) -> float:
    """Return the most seconds that a request can use an adapter's slot."""
    return 0.0 if request.adapter is None else request.deadline_s


# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request was admitted; it came in at ``started_at``, from which its deadline counts."""

    now: float
    started_at: float
    ticket: Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldMoved:
    """The hold of a run is now on the allocation and amount it asked for."""

    now: float
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldRefused:
    """The hold could not be moved and is as before."""

    now: float
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaJoined:
    """An instance takes requests. ``joined_at`` is seconds since the epoch (UTC)."""

    now: float
    hello: Hello
    streams: bool
    joined_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReported:
    """An instance's load, and whether it has begun to drain."""

    now: float
    instance: str
    load: Load
    draining: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLeft:
    """An instance is gone: ``lost`` if it did not say that it would leave."""

    now: float
    instance: str
    lost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaExpected:
    """An instance was asked for and should join in ``ready_in_s`` seconds."""

    now: float
    instance: str
    site: str
    model: str
    ready_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaGivenUp:
    """An instance that was expected will not join."""

    now: float
    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEvent:
    """An instance said something about an attempt."""

    now: float
    run_id: str
    attempt: int
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptLost:
    """Nothing more will be heard of an attempt."""

    now: float
    run_id: str
    attempt: int
    error: FabricError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGone:
    """The client went away or cancelled."""

    now: float
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSlow:
    """The client does not keep up, so the run's replica is held back."""

    now: float
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    now: float


StateEvent = (
    Admitted
    | HoldMoved
    | HoldRefused
    | ReplicaJoined
    | ReplicaReported
    | ReplicaLeft
    | ReplicaExpected
    | ReplicaGivenUp
    | AttemptEvent
    | AttemptLost
    | ClientGone
    | ClientSlow
    | Tick
)


# ---- instructions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveHold:
    """Move a run's hold, and answer with ``HoldMoved`` or ``HoldRefused``."""

    run_id: str
    allocation: str
    amount_usu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTask:
    """Send an attempt to an instance and report all that comes back."""

    run_id: str
    instance: str
    task: Task


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAttempt:
    """Ask the instance to stop, and go on listening for what it consumed."""

    run_id: str
    instance: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonAttempt:
    """Cancel the attempt and listen no longer."""

    run_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Give an event to the run's client."""

    run_id: str
    event: RunEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended, for its record. Times are seconds from when the request came in.

    ``first_s`` is until the first thing it had to say, of whatever kind; ``token_s`` the mean time
    from token to token, where the replica and not a slow client set the pace.
    """

    ticket: Ticket | RedemptionRecord
    state: RunState
    placement: Placement | None
    attempts: int
    usage: Usage
    charge_usu: int
    first_token_s: float | None
    total_s: float
    failure_code: str | None
    first_s: float | None = None
    token_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Charge the hold, return the rest and record the run."""

    run_id: str
    site: str
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """Return all of the hold and record the run."""

    run_id: str
    outcome: Outcome


Instruction = MoveHold | SendTask | CancelAttempt | AbandonAttempt | Emit | Settle | Void
