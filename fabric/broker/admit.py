"""Admission: who may ask, what it may cost at most, and that amount held before it is sent."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypedDict

from fabric.auth import Identity, Permits, Rulebook, require
from fabric.broker.accounts import OwnAccounts
from fabric.broker.lengths import Lengths
from fabric.broker.limits import Limiter, Standing, Turn
from fabric.broker.offers import Offers
from fabric.broker.own import get_own
from fabric.broker.programs import MARGIN, ProgramBounds
from fabric.broker.records import Facts, Records, get_permitted
from fabric.broker.select import MAX_SCARCITY, Context, Offer, expected_tokens
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import Ticket, adapter_s_bound
from fabric.broker.tiers import Factors, get_factors
from fabric.catalog import Catalog
from fabric.errors import (
    ContextExceeded,
    FabricError,
    InsufficientBalance,
    LedgerError,
    NoReplica,
    NotFound,
    NotGranted,
    Overloaded,
    RateLimited,
    RateMissing,
    RequestInvalid,
    RequestOverLimit,
    TierNotHeld,
)
from fabric.ledger import (
    AllocationBalance,
    Ledger,
    charge_usu,
    kv_block_s_bound,
    max_charge_usu,
)
from fabric.messages import Placement, Request, TokensInput, Usage
from fabric.sql import utc_now
from fabric.sql.offload import Offload

Foresee = Callable[[Request, Context], Placement | None]
"""Returns where a request would go now, ``None`` if it would wait; raises ``NoReplica``."""

Also = Callable[[Ticket], None]
"""Runs on the database's thread."""

NOTHING_USED = Usage()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """A request that may be asked, with its prices and bounds."""

    context: Context
    prompt_tokens_bound: int
    max_output_tokens: int
    factors: Factors


class FindAdapter(Protocol):
    """Finds the adapter that a request names; blocks."""

    def __call__(self, name: str, *, project: str, model: str) -> str:
        """Return its digest; raise if the project has none of this name for this version."""


class Admission:
    """Checks requests and holds their largest charge.

    Prices and balances may be up to ``facts_ttl_s`` old when a request is admitted, because the
    ledger itself decides the hold. No request is refused by anything but fresh ones. Grants and
    limits are never older than ``rules`` lets them be.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        catalog: Catalog,
        offload: Offload,
        settings: BrokerSettings,
        rules: Rulebook,
        find_adapter: FindAdapter | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self._ledger = ledger
        self._offload = offload
        self._settings = settings
        self._rules = rules
        self._find_adapter = find_adapter
        self._lengths = lengths
        self.accounts = OwnAccounts()
        """What pays for users' own instances."""
        self._limiter = Limiter()
        self._turns: dict[str, Turn] = {}
        self._records = Records(
            ledger=ledger, catalog=catalog, offload=offload, settings=settings, rules=rules
        )

    @property
    def factors(self) -> Factors:
        """What each tier multiplies a charge by."""
        return get_factors(self._rules.known.tiers)

    def enter(self, run_id: str, identity: Identity) -> None:
        """Count a request. Nothing is awaited, so that no limit can be overshot; the caller has
        just waited for the rules.

        Raises:
            TooManyRequests: As many are in flight as may be.
            RateLimited: The requests of a minute are used up.
        """
        limits = self._rules.known.limits_of(identity)
        self._turns[run_id] = self._limiter.enter(identity, limits)

    def leave(self, run_id: str, usage: Usage = NOTHING_USED) -> None:
        """A request that was counted is over, and has used so much."""
        if (turn := self._turns.pop(run_id, None)) is not None:
            self._limiter.leave(turn, usage.prompt_tokens + usage.output_tokens)

    @contextmanager
    def counted(self, identity: Identity) -> Iterator[None]:
        """Count a part of a request as one in flight.

        Raises:
            TooManyRequests: As many are in flight as may be.
        """
        limits = self._rules.known.limits_of(identity)
        turn = self._limiter.enter(identity, limits, num_requests=0)
        try:
            yield
        finally:
            self._limiter.leave(turn)

    def standing(self, identity: Identity) -> list[Standing]:
        """Return what is left of a caller's limits of requests and tokens."""
        return self._limiter.standing(self._rules.known.limits_of(identity))

    async def admit(
        self,
        identity: Identity,
        request: Request,
        foresee: Foresee,
        *,
        scope: str = "query",
        also: Also | None = None,
        bounds: ProgramBounds | None = None,
    ) -> Ticket:
        """Check a request, hold its largest charge and return its ticket.

        Args:
            identity: Who asks.
            request: What is asked.
            foresee: Where it would go.
            scope: The permission it takes, beside those of a program.
            also: What is written in the transaction of the hold, and refuses it by raising.
            bounds: Of a program, what it may take.

        Raises:
            PermissionDenied: The caller has not the permission.
            UnknownModel: The model is not in the catalog, or hidden from the caller.
            UnknownSite: A site is not in the catalog, or hidden from the caller.
            NotGranted: Nowhere may the caller use the private model, or the sites, so.
            RateLimited: The tokens of a minute could be overdrawn.
            RequestOverLimit: They could be by this request alone.
            NotFound: The project has no adapter of the name.
            AdapterInvalid: It was made for another version.
            ContextExceeded: Prompt and output cannot fit the context.
            RateMissing: Nobody set a price for the model at a site where it may run.
            InsufficientBalance: No allocation covers the largest charge.
            NoReplica: None can serve it, and no wait could help.
            Overloaded: It would have to wait for too long.
            TierNotHeld: Its tier's promise cannot be held.
        """
        _require(identity, scope, bounds)
        permits = await self._rules.permits(identity)
        try:
            facts = await self._records.recent(permits, request.model)
            return await self._admit(identity, permits, request, facts, foresee, also, bounds)
        except (NotGranted, RateLimited, RequestOverLimit, Overloaded, TierNotHeld):
            # Newer prices would not help, and who is refused must not cost much.
            raise
        except FabricError:
            facts = await self._records.read(permits, request.model)
            return await self._admit(identity, permits, request, facts, foresee, also, bounds)

    async def prospect(
        self, identity: Identity, request: Request, bounds: ProgramBounds | None = None
    ) -> Context:
        """Check a request and return what a choice for it rests on. Raises as ``admit`` does, but
        for the balance, which the choice weighs."""
        require(identity, "query" if bounds is None else "program:read")
        permits = await self._rules.permits(identity)
        facts = await self._records.read(permits, request.model)
        context = self._check(request, facts, permits, bounds).context
        await self._adapter_of(identity.project, request, facts.version.ref)
        return context

    async def _admit(
        self,
        identity: Identity,
        permits: Permits,
        request: Request,
        facts: Facts,
        foresee: Foresee,
        also: Also | None,
        bounds: ProgramBounds | None,
    ) -> Ticket:
        checked = self._check(request, facts, permits, bounds)
        adapter = await self._adapter_of(identity.project, request, facts.version.ref)
        offers = checked.context.offers
        affordable = [
            offer
            for offer in offers.values()
            if offer.allocation is not None and offer.available_usu >= offer.max_charge_usu
        ]
        if not affordable:
            raise _insufficient(identity.project, offers)
        placement = foresee(request, checked.context)
        if placement is None:
            offer = min(affordable, key=lambda one: (one.max_charge_usu, one.site))
        else:
            offer = offers[placement.site]
        ticket = Ticket(
            request=request,
            project=identity.project,
            key_id=identity.key_id,
            created_at=utc_now(),
            model=facts.version.ref,
            digest=checked.context.digest,
            adapter=adapter,
            offers=offers,
            rates=facts.rates,
            held_allocation=str(offer.allocation),
            held_usu=offer.max_charge_usu,
            prompt_tokens_bound=checked.prompt_tokens_bound,
            max_output_tokens=checked.max_output_tokens,
            bounds=bounds,
            hidden=facts.hidden,
            own=checked.context.own,
            factors=checked.factors,
        )
        num_tokens = checked.prompt_tokens_bound + request.sampling.n * checked.max_output_tokens
        limits = self._rules.known.limits_of(identity)
        self._limiter.reserve(self._turns[request.id], num_tokens, limits)
        await self._hold(ticket, also)
        return ticket

    async def _adapter_of(self, project: str, request: Request, model: str) -> str | None:
        if request.adapter is None:
            return None
        if self._find_adapter is None:
            raise NotFound(kind="adapter", name=request.adapter)
        find = partial(self._find_adapter, request.adapter, project=project, model=model)
        return await self._offload(find)

    async def _hold(self, ticket: Ticket, also: Also | None) -> None:
        hold = self._offload.urgent(self._open_hold, ticket, also)
        try:
            await hold
        except asyncio.CancelledError:
            # The caller left; what may have been held meanwhile goes back right after it.
            self._offload(self.void, ticket.request.id)
            raise

    def _open_hold(self, ticket: Ticket, also: Also | None) -> None:
        hold = partial(
            self._ledger.hold,
            ticket.request.id,
            allocation=ticket.held_allocation,
            amount_usu=ticket.held_usu,
            lease_s=self._settings.lease_s,
        )
        if also is None:
            hold()
            return
        with self._offload.database.transaction():
            hold()
            also(ticket)

    def void(self, hold_id: str) -> None:
        """Return a hold if there is one. Blocks; for the database's thread."""
        try:
            self._ledger.void(hold_id)
        except LedgerError as error:
            logger.info("nothing to void", extra={"run": hold_id, "code": error.code})

    # ---- checks ---------------------------------------------------------------------------------

    def _check(
        self, request: Request, facts: Facts, permits: Permits, bounds: ProgramBounds | None
    ) -> _Checked:
        version, sites = facts.version, get_permitted(request, facts, permits, bounds)
        if request.mode == "program" and bounds is None:
            reason = "programs have a route of their own, which checks and bounds them"
            raise RequestInvalid(param="mode", value=request.mode, reason=reason)
        if bounds is None:
            prompt_tokens, output_tokens = _bounds(request, version.context_tokens)
        else:
            prompt_tokens, output_tokens = bounds.prompt_tokens, bounds.output_tokens
        factors = self.factors
        offers = self._offers(request, facts, sites, prompt_tokens, output_tokens, bounds, factors)
        if version.digest is None:
            raise NoReplica(model=version.ref, reasons={})
        context = Context(
            model=version.ref,
            digest=version.digest,
            offers=offers,
            remaining_s=request.deadline_s,
            settings=self._settings,
            now=time.monotonic(),
            hidden=facts.hidden,
            own=get_own(request, facts.own, offers),
        )
        return _Checked(
            context=context,
            prompt_tokens_bound=prompt_tokens,
            max_output_tokens=output_tokens,
            factors=factors,
        )

    def _offers(
        self,
        request: Request,
        facts: Facts,
        asked: tuple[str, ...],
        prompt_tokens: int,
        output_tokens: int,
        bounds: ProgramBounds | None,
        factors: Factors,
    ) -> Offers:
        """Return what the request would cost at each site where it may run.

        Raises:
            NoReplica: It may run nowhere.
            RateMissing: At none of them is there a price.
        """
        allowed = asked
        if request.policy == "local-only":
            allowed = tuple(site for site in asked if site == request.data_site)
        if not allowed:
            why = f"the request's data may not leave {request.data_site}"
            raise NoReplica(model=facts.version.ref, reasons=dict.fromkeys(asked, why))
        n, tier = request.sampling.n, request.tier
        likely_prompt, likely_output = expected_tokens(request, self._lengths)
        likely = Usage(prompt_tokens=likely_prompt, output_tokens=n * likely_output)
        likely_device_s, most = 0.0, _Hooks()
        if bounds is not None:
            most = _Hooks(
                hook_bytes_in=bounds.hook_bytes_in,
                hook_bytes_out=bounds.hook_bytes_out,
                device_s=bounds.device_s,
            )
            likely = likely.model_copy(update={"output_tokens": output_tokens} | most)
            likely_device_s = bounds.device_s / MARGIN
        kept_s = kv_block_s_bound(n, prompt_tokens + output_tokens, request.deadline_s)
        total_usu, now_s = sum(one.available_usu for one in facts.allocations), time.monotonic()
        short, usual_usu = self.accounts.shortfalls(allowed, now_s), 0
        if short and facts.usual_rate is not None:
            usual_usu = charge_usu(facts.usual_rate, tier, likely, device_s=likely_device_s)
        offers = {}
        for site in allowed:
            if (rate := facts.rates.get(site)) is None:
                continue
            needed_usu = max_charge_usu(
                *(rate, tier, prompt_tokens, n * output_tokens),
                kv_block_s=kept_s,
                adapter_s=adapter_s_bound(request),
                factors=factors,
                **most,
            )
            payer = _payer(facts.allocations, site, needed_usu)
            available_usu = payer.available_usu if payer else 0
            offers[site] = Offer(
                site=site,
                allocation=payer.name if payer else None,
                available_usu=available_usu,
                max_charge_usu=needed_usu,
                expected_charge_usu=charge_usu(
                    rate, tier, likely, device_s=likely_device_s, factors=factors
                ),
                scarcity=min(MAX_SCARCITY, total_usu / max(1, available_usu)),
                burn_usu_per_day=None if payer is None else facts.burns.get(payer.name),
                days_left=facts.days_left(payer),
                max_in_flight=facts.max_in_flight.get(site),
                closures=facts.closures.get(site, ()),
                lacking_usu=usual_usu * short.get(site, 0.0),
            )
        if not offers:
            raise RateMissing(model=facts.version.ref, site=allowed[0])
        return Offers(offers)


class _Hooks(TypedDict, total=False):
    """What programs pay beside tokens."""

    hook_bytes_in: int
    hook_bytes_out: int
    device_s: float


def _require(identity: Identity, scope: str, bounds: ProgramBounds | None) -> None:
    for one in sorted({scope} if bounds is None else {scope, *bounds.scopes}):
        require(identity, one)


def _bounds(request: Request, context_tokens: int) -> tuple[int, int]:
    """Return the most tokens the prompt and one choice of output can have.

    Raises:
        ContextExceeded: They do not fit, which is known here of token prompts alone; of text the
            instance says it.
    """
    asked = request.sampling.max_tokens
    prompt_tokens = request.prompt_tokens_bound()
    if isinstance(request.input, TokensInput) and prompt_tokens + (asked or 0) > context_tokens:
        raise ContextExceeded(
            prompt_tokens=prompt_tokens, max_tokens=asked or 0, context_tokens=context_tokens
        )
    output_tokens = context_tokens if asked is None else min(asked, context_tokens)
    return min(prompt_tokens, context_tokens), output_tokens


def _payer(
    allocations: tuple[AllocationBalance, ...], site: str, needed_usu: int
) -> AllocationBalance | None:
    """Return the allocation that would pay: one that can, the site's own before the general."""
    usable = [one for one in allocations if one.site in (site, "*")]
    return min(
        usable,
        key=lambda one: (
            one.available_usu < needed_usu,
            one.site == "*",
            -one.available_usu,
            one.name,
        ),
        default=None,
    )


def _insufficient(project: str, offers: Mapping[str, Offer]) -> InsufficientBalance:
    best = max(offers.values(), key=lambda one: one.available_usu - one.max_charge_usu)
    return InsufficientBalance(
        account=best.allocation or f"allocation:{project}:*",
        needed_usu=best.max_charge_usu,
        available_usu=best.available_usu,
    )
