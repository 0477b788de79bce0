"""Tiers as users see them: what is promised and kept, what waits, what a big run would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from fabric.broker import Attained, Estimate, Tier
from fabric.gateway.access import Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.fabric_routes import Listing
from fabric.gateway.hub import caller_of, hub_of
from fabric.messages import ModelRef, Sampling, TokensInput
from fabric.messages import Request as Asked
from fabric.messages.request import SiteName
from fabric.messages.wire import Wire

MAX_REQUESTS = 10**12
MAX_TOKENS = 2**20

router = APIRouter(prefix="/v1/fabric", tags=["fabric"], dependencies=[Depends(Needs("query"))])

Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class EstimateBody(Wire):
    """``POST /v1/fabric/estimate``: how many requests, of which size."""

    model: ModelRef
    num_requests: int = Field(ge=1, le=MAX_REQUESTS)
    prompt_tokens: int = Field(ge=1, le=MAX_TOKENS)
    output_tokens: Tokens
    tier: Literal["interactive", "standard", "batch"] = "batch"
    sites: tuple[SiteName, ...] | None = None

    def to_request(self) -> Asked:
        """Return one of the requests."""
        # Only the length counts, and checking a million ids of one's own would hold the hub up.
        prompt = TokensInput.model_construct(kind="tokens", ids=(0,) * self.prompt_tokens)
        return Asked(
            model=self.model,
            input=prompt,
            sampling=Sampling(max_tokens=self.output_tokens),
            tier=self.tier,
            sites=self.sites,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What waits at the hub for a row of one model, in one tier; ``mine`` is the caller's."""

    model: str
    tier: Tier
    num_waiting: int
    num_mine: int
    seconds: float


@router.get("/slo")
async def read_attainment(request: Request) -> Listing[Attained]:
    """Return how far the promise of each tier was kept, over several windows."""
    tiers = hub_of(request).broker.tiers
    await tiers.heed()
    return Listing(data=tiers.attained())


@router.get("/queue")
async def list_waiting(request: Request) -> Listing[Queue]:
    """Return what waits at the hub for models that the caller may use. Whose it is, others are not
    told."""
    hub, caller = hub_of(request), caller_of(request)
    permits = await hub.permits(caller)
    numbers, mine = Counter[tuple[str, Tier]](), Counter[tuple[str, Tier]]()
    seconds: dict[tuple[str, Tier], float] = {}
    for one in hub.broker.tiers.waiting():
        if not permits.sees_model(one.model.partition("@")[0]):
            continue
        key = one.model, one.tier
        numbers[key] += one.num_waiting
        mine[key] += one.num_waiting if one.project == caller.project else 0
        seconds[key] = seconds.get(key, 0.0) + one.seconds
    return Listing(data=_queues(numbers, mine, seconds))


@router.post("/estimate", openapi_extra=documented(EstimateBody))
async def estimate_run(request: Request) -> Estimate:
    """Say what many requests would take and cost, by site. Nothing is run and nothing is held."""
    body = await read_body(request, EstimateBody)
    hub, caller = hub_of(request), caller_of(request)
    return await hub.broker.tiers.estimate(caller, body.to_request(), body.num_requests)


def _queues(
    numbers: Counter[tuple[str, Tier]],
    mine: Counter[tuple[str, Tier]],
    seconds: dict[tuple[str, Tier], float],
) -> Sequence[Queue]:
    return [
        Queue(
            model=model,
            tier=tier,
            num_waiting=number,
            num_mine=mine[model, tier],
            seconds=seconds[model, tier],
        )
        for (model, tier), number in sorted(numbers.items())
    ]
