"""What the hub says of its tiers: promises, queues, estimates. Amounts are micro-SU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from fabric.sdk.records import Record, each

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.sdk.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Attained(Record):
    """How far one promise of a tier was kept: for the part ``attained`` of the requests of a
    window, where it is promised for the part ``objective``; ``budget_left`` of what may be missed
    is left."""

    tier: str
    measure: str
    limit_s: float | None
    objective: float
    window: str
    num_requests: int
    attained: float | None
    budget_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue(Record):
    """What waits at the hub for rows of a model, and how much of it is the caller's project's."""

    model: str
    tier: str
    num_waiting: int
    num_mine: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration(Record):
    """Seconds that are not exceeded with a probability of 10, 50 and 90%."""

    p10_s: float
    p50_s: float
    p90_s: float


def _maybe_duration(reply: dict[str, float] | None) -> Duration | None:
    return None if reply is None else Duration.from_reply(reply)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEstimate(Record):
    """What a whole run would take at one site alone; no ``duration`` where no replica is."""

    nested = {"duration": _maybe_duration}

    site: str
    num_replicas: int
    num_rows: int
    requests_per_s: float
    duration: Duration | None
    is_measured: bool
    charge_usu: int
    available_usu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Record):
    """What a run would take at each site alone, and at all of them together."""

    nested = {"duration": _maybe_duration, "sites": each(SiteEstimate)}

    model: str
    tier: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    sites: tuple[SiteEstimate, ...]
    requests_per_s: float
    duration: Duration | None
    is_measured: bool
    charge_usu: int


class Size(TypedDict):
    """How large each request of a big run is, and what may answer it; see ``Fabric.estimate``."""

    prompt_tokens: int
    output_tokens: int
    tier: NotRequired[Literal["interactive", "standard", "batch"]]
    sites: NotRequired[Sequence[str] | None]


async def get_attained(transport: Transport) -> tuple[Attained, ...]:
    """Return how far the promise of each tier was kept."""
    reply = await transport.get("/v1/fabric/slo")
    return tuple(Attained.from_reply(item) for item in reply["data"])


async def get_queues(transport: Transport) -> tuple[Queue, ...]:
    """Return what waits at the hub."""
    reply = await transport.get("/v1/fabric/queue")
    return tuple(Queue.from_reply(item) for item in reply["data"])


async def get_estimate(
    transport: Transport,
    model: str,
    num_requests: int,
    *,
    prompt_tokens: int,
    output_tokens: int,
    tier: Literal["interactive", "standard", "batch"] = "batch",
    sites: Sequence[str] | None = None,
) -> Estimate:
    """Return what a run would take."""
    body = {
        "model": model,
        "num_requests": num_requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tier": tier,
        **({} if sites is None else {"sites": list(sites)}),
    }
    return Estimate.from_reply(await transport.post("/v1/fabric/estimate", body))
